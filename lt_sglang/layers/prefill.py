"""What each request of a prefill batch is to have done with its layers.

    known        its layers are known: lazy ones use streaming attention, K and V go to their banks
    select       full attention everywhere; layer by layer the scores fill the queue; what it pops moves
    staged       full attention everywhere; another chunk follows before its layers are selected

Until its layers are known, a request keeps a full and a streaming slot for each of its tokens, so K and V of
all layers: layer l is in bank l. Once they are, its streaming slots are let go but for its window.

SGLang prefills at most one request in chunks at a time, so at most one is staged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any

from lt_sglang.config import LAST_QUERIES_FIRST_CHUNK, LIST, LightTransferConfig
from lt_sglang.layers.chosen import Remembered, remembered
from lt_sglang.layers.layer_sets import LayerSet, LayerSetStore
from lt_sglang.layers.prefix_index import PromptStart, prompt_start
from lt_sglang.memory.kv_keys import determined_by_key

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


# Sets of one prompt that are looked through, the last used first.
MOST_COPIES_SEEN = 8


class Kind(IntEnum):
    """What a prefill does with a request's layers; the kernels know the numbers."""

    KNOWN = 0
    SELECT = 1
    STAGED = 2


@dataclass(frozen=True)
class Prefill:
    """One request of a prefill batch.

    row: of req_to_token. layer_set: row of the layer table. prefix, extend: tokens before and in this chunk.
    last_queries: where layers are selected, how many of the last queries are scored. laziness: of a request
    that was retracted, what its layers had scored; they are not scored again.
    """

    kind: Kind
    row: int
    layer_set: int
    prefix: int
    extend: int
    last_queries: int = 0
    laziness: tuple[float, ...] | None = None

    @property
    def end(self) -> int:
        """Tokens of the request once this chunk is done."""
        return self.prefix + self.extend


def digest(req: Any) -> bytes:
    """Of a request's whole prompt; made once a request."""
    if not hasattr(req, "lighttransfer_digest"):
        req.lighttransfer_digest = blake2b(req.origin_input_ids.tobytes(), digest_size=16).digest()
    return bytes(req.lighttransfer_digest)


def is_copy(req: Any, entry: LayerSet) -> bool:
    """Whether ``req`` is one of n copies of the very prompt that ``entry`` was selected for."""
    n = getattr(getattr(req, "sampling_params", None), "n", 1) or 1
    return n > 1 and entry.selected_for == digest(req)


class PrefillTracker:
    """Assigns layer sets as requests are prefilled; host state that every rank keeps alike.

    Args:
        config: what is served.
        sets: the layer sets.
        undecided_tokens: longest prefix that stays undecided between two chunks (memory/sizes.py).

    Attributes:
        sets: the layer sets.
        block_tokens: tokens of the first block, w_sink + w_recent; no longer prompts use set 0.
        listed: whether all requests have the same layers, those of a list.
        staged: the request between two chunks whose layers are not known, or None.
    """

    def __init__(self, config: LightTransferConfig, sets: LayerSetStore, undecided_tokens: int) -> None:
        self.sets = sets
        self.block_tokens = config.lazy_tokens
        self.listed = config.score == LIST
        self.staged: str | None = None
        self._config = config
        self._undecided_tokens = undecided_tokens
        self._full_rows: dict[str, int] = {}

    def prompt_start(self, tokens: Any, extra_key: str | None, cache_salt: str | None) -> PromptStart:
        """How a prompt begins; ``tokens``: an array of token ids, longer than the first block."""
        return prompt_start(tokens, self.block_tokens, (extra_key, cache_salt))

    def hit_tokens(self, tokens: int) -> int:
        """How many cached tokens make a hit for a prompt of ``tokens``: a long one needs its first block."""
        return self.block_tokens if tokens > self.block_tokens else 0

    def inherit(
        self,
        request: str,
        entry: LayerSet | None,
        prompt: PromptStart | None,
        *,
        had: Remembered | None = None,
    ) -> None:
        """``request`` is admitted with a cached prefix and uses its writer's set.

        entry: the set its prefix was found in. prompt: None if that is the default, which short prompts use.
        had: what the request had before it was retracted.
        """
        if entry is self.sets.default:
            self.sets.use_default(request, counted=had is None)
            return
        if entry is None or not entry.stored:
            raise RuntimeError(f"request {request}: the layer set of its cached prefix is gone")
        assert prompt is not None
        self.sets.inherit(request, entry, prompt, resumed=had is not None)

    def memory_of(self, request: str, inherited: Callable[[], int]) -> Remembered | None:
        """What ``request`` must have again after a retraction; None if nothing was chosen yet.

        inherited: how many rows that it shares with the prefix cache were computed with full attention
        (layers/full_rows.py); asked of a request that inherited its layers.
        """
        entry = self.sets.of(request)
        if entry is None or entry.chosen is None:
            return None
        default = entry is self.sets.default
        full_rows = 0 if default else self._full_rows.get(request)
        return Remembered(
            uid=entry.uid,
            default=default,
            full_rows=inherited() if full_rows is None else full_rows,
            laziness=entry.chosen.laziness,
        )

    def chunk_limit(self, req: Req) -> int | None:
        """Most tokens of a waiting request's next chunk, or None: where full attention was to end, it ends.

        A request that was retracted and whose K and V are gone computes its prompt again as it did at first,
        and its output in a chunk of its own, as decode did: with streaming attention in its lazy layers. With
        a list, full attention may end at a prompt's branching point (``branch``).
        """
        end = self._full_until(req)
        return None if end is None or end <= req.prefix_len else end - int(req.prefix_len)

    def branch(
        self, req: Any, prompt: PromptStart, copied: LayerSet | None, *, most: int, page_size: int
    ) -> None:
        """Decide whether the prefill of ``req``, which has no hit, stops at its branching point.

        That is where its ``prompt`` parts from those of stored sets. Later prompts with the same beginning
        then have a hit there. With a list only, and only if what is left of the prompt fits into a window: it
        streams in lazy layers.

        Args:
            req: the request.
            prompt: how it begins.
            copied: the set of the same prompt, of which ``req`` is one of n copies: it stops where that did.
            most: tokens that ``req`` may read from the cache; fewer where it asks for log-probabilities.
            page_size: hits are whole pages.
        """
        total = len(req.origin_input_ids)
        agreed = self.sets.agreed(prompt) if self.listed else 0
        # Of a prompt that was there as a whole the last token is left to compute.
        end = agreed // page_size * page_size if agreed < total - 1 else 0
        useful = self.block_tokens <= end <= most and total - end <= self.block_tokens
        req.lighttransfer_branching_seqlen = copied.branching_seqlen if copied else end if useful else 0

    def refuses(self, entry: LayerSet, tokens: int, hit: int) -> bool:
        """Whether a prompt of ``tokens`` should not take a ``hit`` up to the branching point of ``entry``.

        A rest that is longer than a window is computed with full attention, as it would be without the hit.
        """
        return hit <= entry.branching_seqlen and tokens - hit > self.block_tokens

    @staticmethod
    def _full_until(req: Any) -> int | None:
        """The token at which full attention ends before ``req`` does; None: nowhere."""
        had = remembered(req)
        if had is None:
            return getattr(req, "lighttransfer_branching_seqlen", 0) or None
        return None if had.default else had.full_rows

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
        self._full_rows.pop(request, None)
        self.sets.release(request, row)

    def _admit(self, name: str, req: Req, *, counted: bool) -> None:
        if req.prefix_len:
            raise RuntimeError(f"request {name}: a cached prefix without a layer set")
        # Its prompt tells, whatever it has said since (it may have been retracted).
        prompt, had = req.origin_input_ids, remembered(req)
        if len(prompt) <= self.block_tokens:
            self.sets.use_default(name, counted=counted and had is None)
            return
        self.sets.create(name, self.prompt_start(prompt, req.extra_key, req.cache_salt))

    def _plan(self, name: str, req: Req) -> Prefill:
        entry = self.sets.of(name)
        assert entry is not None
        prefix, end = req.prefix_len, req.extend_end
        kind, queries, had = Kind.KNOWN, 0, None
        if not entry.known:
            had = remembered(req)
            until = self._full_until(req)
            total = len(req.origin_input_ids) + len(req.output_ids) if until is None else until
            first_chunk = self._config.decide == "first-chunk"
            if end >= total:
                kind, queries = Kind.SELECT, self._config.last_queries
                if self.listed and end < len(req.origin_input_ids):
                    self.sets.branch(name, end)
            elif end > self._undecided_tokens:
                kind = Kind.SELECT
                queries = LAST_QUERIES_FIRST_CHUNK if first_chunk else self._config.last_queries
            else:
                kind = Kind.STAGED
        if kind == Kind.SELECT:
            self._select(name, req, end, resumed=had is not None)
        self._stage(name, kind)
        return Prefill(
            kind,
            req.kv.req_pool_idx,
            entry.index,
            prefix,
            end - prefix,
            min(queries, end),
            None if had is None else had.laziness,
        )

    def _select(self, name: str, req: Req, end: int, *, resumed: bool) -> None:
        self._full_rows[name] = end
        stored = determined_by_key(req) and not self._is_one_copy_more(name, req)
        self.sets.mark_known(name, stored=stored, selected_for=digest(req), resumed=resumed)

    def _is_one_copy_more(self, name: str, req: Req) -> bool:
        """Whether a copy of this prompt has its set stored; thousands would push out everybody's."""
        prompt = getattr(self.sets.of(name), "prompt", None)
        alike = () if prompt is None else islice(self.sets.find(prompt), MOST_COPIES_SEEN)
        return any(is_copy(req, entry) for entry in alike)

    def _stage(self, name: str, kind: Kind) -> None:
        if self.staged == name and kind != Kind.STAGED:
            self.staged = None  # read before another request of this batch writes its own
        elif kind == Kind.STAGED:
            if self.staged not in (None, name):
                raise RuntimeError(f"requests {self.staged} and {name} are both staged between chunks")
            self.staged = name
