"""What forwards of a test read and write: tags in place of K and V, compared with what should be there."""

from __future__ import annotations

from dataclasses import dataclass, field
from zlib import crc32

import torch
from sglang.srt.managers.schedule_batch import Req

from lt_sglang.attention.static_torch import block_keys
from lt_sglang.memory.kv_keys import request_id
from tests.property.cpu import Caches, Sizes, audit_stores
from tests.unit.streaming import visible

VERSIONS = 256


@dataclass
class Written:
    """What a request's K and V were computed for: a chain of hashes of its tokens, and weights."""

    secret: int  # of a request whose token ids do not say what it reads
    base: list[int] = field(default_factory=list)
    version: list[int] = field(default_factory=list)


class Reads:
    """The caches, and what the rows of every request were computed for. version: of the weights of now."""

    def __init__(self, sizes: Sizes) -> None:
        self.caches = Caches(sizes)
        self.version = 1
        self.mixed = False  # rows of one request may be of several weights
        self.known: dict[str, Req] = {}  # all that are not over
        self.written: dict[str, Written] = {}

    def _flush(self) -> None:
        self.caches.flush()
        audit_stores(self.caches, [req for req in self.known.values() if req.kv.holds_kv])

    def _slots(self, req: Req, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        full = self.caches.rows.req_to_token[req.kv.req_pool_idx, :length].to(torch.int64)
        return full, self.caches.allocator.full_to_swa_index_mapping[full]

    def _tags(self, req: Req, length: int, cached: int) -> torch.Tensor:
        """int64 [length]: what the rows of its positions hold, the new ones computed with the weights of now.

        cached: how many come from earlier batches, or from the prefix cache: those hold what they held there,
        which must have been computed for the same tokens, of whatever weights.
        """
        name, written = request_id(req), self.written[request_id(req)]
        uid = 0
        if self.caches.prefills is not None:
            entry = self.caches.prefills.sets.of(name)
            assert entry is not None
            uid = entry.uid
        tokens = (req.origin_input_ids + req.output_ids).tolist()
        for position in range(len(written.base), length):
            # Of whole numbers alone: other hashes differ from process to process.
            owner = repr((written.secret, uid, req.extra_key, req.cache_salt))
            before = written.base[-1] if position else crc32(owner.encode())
            # A token that was sampled, but whose result is not processed yet.
            token = tokens[position] if position < len(tokens) else self._next(written)
            written.base.append(hash((before, token)) & ((1 << 47) - 1))
        if len(written.version) < cached:
            full, _ = self._slots(req, cached)
            found = self._cached(req, cached, full).tolist()
            assert [tag // VERSIONS for tag in found] == written.base[:cached], "a hit on another's prefix"
            written.version = [tag % VERSIONS for tag in found]
        written.version += [self.version] * (length - len(written.version))
        pairs = zip(written.base[:length], written.version[:length], strict=True)
        return torch.tensor([base * VERSIONS + version for base, version in pairs])

    def _cached(self, req: Req, cached: int, full: torch.Tensor) -> torch.Tensor:
        """What the rows of its cached positions hold; without a full layer, what they should hold."""
        if self.caches.sizes.full:
            return self.caches.read(False, full)
        return torch.tensor([base * VERSIONS + self.version for base in self.written[request_id(req)].base])[
            :cached
        ]

    def _next(self, written: Written) -> int:
        return written.base[-1] % 5

    def _check_extend(
        self, prefix: int, tags: torch.Tensor, streaming: torch.Tensor, sinks: torch.Tensor
    ) -> None:
        windows, count = self.caches.windows, len(tags) - prefix
        slots, mask = block_keys(streaming, prefix, count, sinks, windows)
        values = self.caches.read(True, slots)
        for query in range(count):
            seen = visible(prefix + query, windows.sink_tokens, windows.recent_tokens)
            self._compare(values[mask[query]], tags[seen])

    def _compare(self, read: torch.Tensor, tags: torch.Tensor, layer: str = "lazy") -> None:
        """Full layers read in the order of positions, lazy ones in any."""
        if self.mixed:
            read, tags = read // VERSIONS, tags // VERSIONS
        if layer == "lazy":
            read, tags = read.sort().values, tags.sort().values
        assert torch.equal(read, tags), f"a {layer} layer reads another's rows"
