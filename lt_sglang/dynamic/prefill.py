"""What each request of a prefill batch is to have done with its layers.

    decided      its set is known: lazy layers use streaming attention, K and V go to their banks
    decide       full attention everywhere; layer by layer the scores fill the queue; what it pops is cut
    stage        full attention everywhere; another chunk follows before it is decided. Layers from P on
                 wait in the staging banks

SGLang prefills at most one request in chunks at a time, so at most one is staged.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from lt_sglang.config import LAST_QUERIES, LAST_QUERIES_FIRST_CHUNK, LightTransferConfig
from lt_sglang.dynamic.beginnings import Beginnings, beginnings
from lt_sglang.dynamic.layer_sets import LayerSet, LayerSetStore

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Kind(IntEnum):
    """What a prefill does with a request's layers; the kernels know the numbers."""

    DECIDED = 0
    DECIDE = 1
    STAGE = 2


@dataclass(frozen=True)
class Prefill:
    """One request of a prefill batch.

    row: of req_to_token. layer_set: row of the layer table. prefix, extend: tokens before and in this chunk.
    last_queries: of a deciding request, how many of its last queries are scored.
    """

    kind: Kind
    row: int
    layer_set: int
    prefix: int
    extend: int
    last_queries: int = 0

    @property
    def end(self) -> int:
        """Tokens of the request once this chunk is done."""
        return self.prefix + self.extend


class PrefillTracker:
    """Assigns layer sets as requests are prefilled; host state that every rank keeps alike.

    Attributes:
        sets: the layer sets.
        block_tokens: tokens of the first block, w_sink + w_recent; no longer prompts use set 0.
        staged: the request between two chunks that is undecided, or None.
    """

    def __init__(self, config: LightTransferConfig, context_tokens: int, sets: LayerSetStore) -> None:
        self.sets = sets
        self.block_tokens = config.lazy_tokens
        self.staged: str | None = None
        self._config = config
        self._stage_limit = config.stage_limit(context_tokens)

    def beginnings(self, tokens: Any, extra_key: str | None, cache_salt: str | None) -> Beginnings:
        """How a prompt begins; ``tokens``: an array of token ids, longer than the first block."""
        return beginnings(tokens, self.block_tokens, (extra_key, cache_salt))

    def hit_tokens(self, tokens: int) -> int:
        """How many cached tokens make a hit for a prompt of ``tokens``: a long one needs its first block."""
        return self.block_tokens if tokens > self.block_tokens else 0

    def inherit(self, request: str, entry: LayerSet | None, prompt: Beginnings | None) -> None:
        """``request`` is admitted with a cached prefix and uses its writer's set.

        entry: the set its prefix was found in. prompt: None if that is the default, which short prompts use.
        """
        if entry is self.sets.default:
            self.sets.use_default(request)
            return
        if entry is None or not entry.stored:
            raise RuntimeError(f"request {request}: the layer set of its cached prefix is gone")
        assert prompt is not None
        self.sets.inherit(request, entry, prompt)

    def begin(self, requests: Sequence[tuple[str, Req]], probes: Collection[str] = ()) -> list[Prefill]:
        """Plan the prefill of a batch, in its order; called once, right before its forward.

        probes: health checks among them, which no counter shows.
        """
        for name, req in requests:
            if self.sets.of(name) is None:
                self._admit(name, req, counted=name not in probes)
            self.sets.place(name, req.kv.req_pool_idx)
        # The request that was staged comes before the one that will be, whatever the order of the batch.
        order = sorted(range(len(requests)), key=lambda i: requests[i][0] != self.staged)
        plans = {i: self._plan(*requests[i]) for i in order}
        return [plans[i] for i in range(len(requests))]

    def release(self, request: str, row: int | None) -> None:
        """``request`` ends or gives its row back."""
        if self.staged == request:
            self.staged = None
        self.sets.release(request, row)

    def _admit(self, name: str, req: Req, *, counted: bool) -> None:
        tokens = req.origin_input_ids + req.output_ids
        if req.prefix_len:
            raise RuntimeError(f"request {name}: a cached prefix without a layer set")
        if len(tokens) <= self.block_tokens:
            self.sets.use_default(name, counted=counted)
            return
        self.sets.create(name, self.beginnings(tokens, req.extra_key, req.cache_salt))

    def _plan(self, name: str, req: Req) -> Prefill:
        entry = self.sets.of(name)
        assert entry is not None
        prefix, end = req.prefix_len, req.extend_end
        kind, queries = Kind.DECIDED, 0
        if not entry.decided:
            total = len(req.origin_input_ids) + len(req.output_ids)
            first_chunk = self._config.decide == "first-chunk"
            if end >= total:
                kind, queries = Kind.DECIDE, LAST_QUERIES
            elif end > self._stage_limit:
                kind, queries = Kind.DECIDE, LAST_QUERIES_FIRST_CHUNK if first_chunk else LAST_QUERIES
            else:
                kind = Kind.STAGE
        if kind == Kind.DECIDE:
            self.sets.decide(name)
        self._stage(name, kind)
        return Prefill(kind, req.kv.req_pool_idx, entry.index, prefix, end - prefix, min(queries, end))

    def _stage(self, name: str, kind: Kind) -> None:
        if self.staged == name and kind != Kind.STAGE:
            self.staged = None  # read before another request of this batch writes its own
        elif kind == Kind.STAGE:
            if self.staged not in (None, name):
                raise RuntimeError(f"requests {self.staged} and {name} are both undecided between chunks")
            self.staged = name
