"""Admission: what a prefill pass may take of memory that full and lazy layers share.

SGLang asks a budget object per pass. This one reckons in units (memory/demand.py), with host counts that are
equal on every rank. SGLang's own offsets count tokens; here one such token is a page's units of both kinds
over the page size.

Source: sglang/srt/mem_cache/prefill_budget.py, sglang/srt/managers/schedule_policy.py (PrefillAdder).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from lt_sglang.memory.demand import Demand, expected_output

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class UnitBudget(PrefillBudget):
    """One prefill pass over an ElasticAllocator.

    ``consider`` tells which request SGLang asks about next (hooks/wrappers.py); its calls name only numbers,
    some of them clipped.

    Attributes:
        extend_tokens: that the request has to compute yet.
    """

    def __init__(self, allocator: Any, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> None:
        super().__init__(allocator, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        self._demand: Demand = allocator.demand
        self._per_token = self._demand.both / self.page_size
        self.extend_tokens = self._output = 0
        self._loads = (0, 0)
        self._pinned = 0
        self._full_offset: int | None = None
        self._considered: Req | None = None

    def consider(self, req: Req, adder: Any, on_host: tuple[int, int] = (0, 0)) -> None:
        """SGLang is about to ask whether ``req`` fits, and to reserve for it if so.

        on_host: tokens that its hit has in host memory, in full and in lazy layers. Some of the full ones may
            be on the device as well, behind a window that is not.
        """
        if self._full_offset is None:
            running = () if adder.running_batch is None else adder.running_batch.reqs
            self._full_offset = sum(output_of(one, adder.new_token_ratio, self._demand) for one in running)
        self._considered = req
        self._loads, self._pinned = (0, 0), 0
        if any(on_host):
            self._loads = self.tree_cache.tokens_to_load(req), on_host[1]
            before = self.allocator.evictable_units(self.tree_cache)
            with adder._lock_node(req.best_match_node, lock_host=True):
                self._pinned = before - self.allocator.evictable_units(self.tree_cache)
        self.extend_tokens = len(req.full_untruncated_fill_ids) - req.prefix_len - on_host[0]
        self._output = output_of(req, adder.new_token_ratio, self._demand)

    @property
    def remaining_units(self) -> float:
        """Units that are free or evictable, less what is promised."""
        free = len(self.allocator.units) + self.allocator.evictable_units(self.tree_cache)
        return float(free - self.total_offset * self._per_token)

    @property
    def remaining_total(self) -> float:
        """The same in tokens."""
        return self.remaining_units / self._per_token

    @property
    def remaining_current(self) -> float:
        """As ``remaining_total``."""
        return self.remaining_total

    @property
    def remaining_swa(self) -> float:
        """As ``remaining_total``."""
        return self.remaining_total

    def has_capacity(self) -> bool:
        """Whether anything may be left."""
        return self.remaining_units > 0

    def check_prefill(self, *, chunk_limit: int | None, **given: Any) -> tuple[bool, int | None]:
        """Whether the request that is considered fits as a whole; its chunk is not limited by memory."""
        return (True, chunk_limit) if self._fits() else (False, None)

    def can_allocate_prefill(self, **given: Any) -> bool:
        """As ``check_prefill``."""
        return self._fits()

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        """``fit_chunk`` says it."""
        return chunk_limit if chunk_limit > 0 else None

    def fit_chunk(self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int) -> int | None:
        """Tokens of the next chunk of a request that was admitted: what can be had now; None for none."""
        pages = int(self.remaining_units // self._demand.both) - 1
        if pages * self.page_size >= min(extend_input_len, chunk_limit):
            return chunk_limit
        return pages * self.page_size if pages > 0 else None

    def prepare_load_back(self, **given: Any) -> bool:
        """Whether what HiCache would load has its units now; cached tokens go for it."""
        return bool(self.allocator.make_spare(self._demand.units(*self._loads), drop_sinks=True))

    def reserve(self, extend_input_len: int, max_new_tokens: int, **given: Any) -> None:
        """Promise the request that is considered what it will take, later chunks included."""
        assert self._considered is not None, "a request was admitted that nobody considered"
        # What was to be loaded has been, and is held, or is not.
        self._loads, self._pinned = (0, 0), 0
        self.extend_tokens = len(self._considered.full_untruncated_fill_ids) - self._considered.prefix_len
        self.allocator.promised += self._demand.both * (self._demand.pages(extend_input_len) + 1)
        self.total_offset += self._need() / self._per_token
        assert self._full_offset is not None
        self._full_offset += self.extend_tokens + self._output

    def _need(self) -> int:
        """With what it would load, and what would no longer be evictable then."""
        new = self._demand.of_new(self.extend_tokens, self._output)
        return new + self._demand.units(*self._loads) + self._pinned

    def _fits(self) -> bool:
        full = self.allocator.full_available_size() + self.tree_cache.full_evictable_size()
        wanted = (
            self._loads[0] + self.extend_tokens + self._output + self.page_size + (self._full_offset or 0)
        )
        return self._need() <= self.remaining_units and (wanted <= full or not self.allocator.full_is_limited)


def output_of(req: Req, ratio: float, demand: Demand) -> int:
    """Tokens that ``req`` is reckoned to output yet; SGLang's ratio where it may end early."""
    limit = req.sampling_params.max_new_tokens
    # Where a client names none, SGLang puts the rest of the context.
    named = len(req.origin_input_ids) + limit < demand.context - 2
    return expected_output(
        limit - len(req.output_ids),
        1.0 if req.sampling_params.ignore_eos else ratio,
        named=named,
        unnamed=CLIP_MAX_NEW_TOKENS,
    )


def running_offset(req: Req, ratio: float, allocator: Any) -> float:
    """What a decoding request will take beyond what it holds, in SGLang's tokens; of an ElasticAllocator."""
    demand: Demand = allocator.demand
    evicted, published = req.kv.get_evicted_seqlen(ComponentType.SWA), req.kv.cache_protected_len
    returned = 0
    # The tree lets a window go once, however many requests hit it: on account of who computed it. One that is
    # late to go has no sink set, and may never go.
    waits = req.lock is not None and not req.lock.swa_released
    if waits and req.decode_batch_idx <= demand.window + demand.interval:
        returned = min(demand.window, max(published - getattr(req, "lighttransfer_prefix", 0), 0))
    units = demand.of_running(
        req.kv.kv_allocated_len - max(evicted, published),
        output_of(req, ratio, demand),
        returned,
        new_sinks=not evicted,
    )
    return float(units * allocator.page_size / demand.both)
