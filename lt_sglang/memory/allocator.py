"""SGLang's allocator of full and streaming slots over one list of units (memory/units.py).

What SGLang asks of an allocator is counts, and those are host numbers that are equal on every rank. Slots of
both kinds come from the same units, so the two sides are priced together: in admission (memory/budget.py), in
eviction, and before each allocation.

Source: sglang/srt/mem_cache/allocator/base.py, swa.py, token.py and paged.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.kernels.ops.memory.allocator import alloc_decode_kernel, alloc_extend_kernel
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import (
    PagedTokenToKVPoolAllocator,
    alloc_decode_naive,
    alloc_extend_naive,
)
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.utils import get_num_new_pages, next_power_of_2

from lt_sglang.errors import LightTransferError
from lt_sglang.memory.budget import UnitBudget
from lt_sglang.memory.demand import Demand
from lt_sglang.memory.sinks import SinkStore
from lt_sglang.memory.units import UnitList, UnitShape


class SlotAllocator(BaseTokenToKVPoolAllocator):
    """Slots of one kind, ``parts`` units a page.

    Args:
        units: where they come from.
        parts: units of a page, from 1.
        limit: most slots in use at once; None for as many as there are.
        dtype, kvcache: SGLang's.

    Attributes:
        used: slots in use.
    """

    def __init__(
        self, units: UnitList, parts: int, dtype: torch.dtype, kvcache: Any, limit: int | None = None
    ) -> None:
        most = units.size // parts * units.page_size
        size = most if limit is None else min(limit // units.page_size * units.page_size, most)
        super().__init__(size, units.page_size, dtype, units.device, kvcache, need_sort=False)
        self._units = units
        self.parts = parts
        self.used = 0
        self.debug_mode = False
        self._pages_of_group: list[torch.Tensor] = []

    def available_size(self) -> int:
        """Slots that can be had now if no other kind takes units."""
        free = len(self._units) // self.parts * self.page_size
        return min(free, self.size - self.used)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """``need_size`` slots (whole pages), int64; None if there are fewer."""
        if need_size > self.available_size():
            return None
        pages = self._take(-(-need_size // self.page_size))
        if self.page_size == 1:
            return pages
        offset = torch.arange(self.page_size, device=self.device)
        return (pages[:, None] * self.page_size + offset).flatten()

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """As PagedTokenToKVPoolAllocator."""
        new = num_new_pages
        if new is None:
            new = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if new * self.page_size > self.available_size():
            return None
        pages = self._take(new)
        out = torch.empty(extend_num_tokens, dtype=torch.int64, device=self.device)
        if out.is_cuda:
            requests = len(prefix_lens)
            alloc_extend_kernel[(requests,)](
                prefix_lens, seq_lens, last_loc, pages, out, next_power_of_2(requests), self.page_size
            )
        else:
            alloc_extend_naive(prefix_lens, seq_lens, last_loc, pages, out, self.page_size, self.device)
        return out

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """As PagedTokenToKVPoolAllocator."""
        new = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        if new * self.page_size > self.available_size():
            return None
        pages = self._take(new)
        out = torch.empty(len(seq_lens), dtype=torch.int64, device=self.device)
        if out.is_cuda:
            requests = len(seq_lens)
            alloc_decode_kernel[(requests,)](
                seq_lens, last_loc, pages, out, next_power_of_2(requests), self.page_size
            )
        else:
            alloc_decode_naive(seq_lens, last_loc, pages, out, self.page_size, new)
        return out

    def rows_in_parts(self, slots: torch.Tensor) -> torch.Tensor:
        """As UnitList, of slots of this kind."""
        return self._units.rows_in_parts(slots, self.parts)

    def free(self, free_index: torch.Tensor) -> None:
        """As PagedTokenToKVPoolAllocator: a set of slots, whose whole pages are freed."""
        if free_index.numel() == 0:
            return
        if self.free_group is not None:
            self.free_group.append(self._copy_for_free_group(free_index))
            return
        self._give(free_index if self.page_size == 1 else torch.unique(free_index // self.page_size))

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
        """As PagedTokenToKVPoolAllocator."""
        assert start_pos % self.page_size == 0, f"segment start {start_pos} is not page-aligned"
        self.free_page_ids(free_index[:: self.page_size] // self.page_size)

    def free_page_ids(self, page_ids: torch.Tensor) -> None:
        """As PagedTokenToKVPoolAllocator."""
        if page_ids.numel() == 0:
            return
        if self.free_group is not None:
            self._pages_of_group.append(self._copy_for_free_group(page_ids))
            return
        self._give(page_ids)

    def free_group_end(self) -> None:
        """As BaseTokenToKVPoolAllocator."""
        super().free_group_end()
        if self._pages_of_group:
            pages, self._pages_of_group = torch.cat(self._pages_of_group), []
            self._give(pages)

    def clear(self) -> None:
        """Forget what is in use; the owner of the units frees them."""
        self.used = 0
        self.free_group = None
        self._pages_of_group = []

    get_cpu_copy = PagedTokenToKVPoolAllocator.get_cpu_copy
    load_cpu_copy = PagedTokenToKVPoolAllocator.load_cpu_copy

    def _take(self, pages: int) -> torch.Tensor:
        self.used += pages * self.page_size
        return self._units.take(pages, self.parts)

    def _give(self, pages: torch.Tensor) -> None:
        self.used -= len(pages) * self.page_size
        assert self.used >= 0, "more slots freed than there are in use"
        self._units.give(pages, self.parts)


class SinkAllocator(SlotAllocator):
    """Slots of sink sets. They are taken between two steps, and leave alone what the next was promised."""

    def __init__(self, owner: ElasticAllocator) -> None:
        super().__init__(
            owner.units, owner.shape.streaming_units, owner.dtype, owner.get_kvcache().swa_kv_pool
        )
        self._owner = owner

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """As SlotAllocator; cached tokens go for them."""
        spare = self._owner.make_spare(-(-need_size // self.page_size) * self.parts)
        return super().alloc(need_size) if spare else None


@dataclass
class Retractions:
    """Requests that gave their slots back before they were done, by cause.

    memory: no units were left. limit: full slots up to --max-total-tokens were in use. other: a more urgent
    request, or a pause.
    """

    memory: int = 0
    limit: int = 0
    other: int = 0


class ElasticAllocator(SWATokenToKVPoolAllocator):
    """SWATokenToKVPoolAllocator whose sides share units; rows of sink sets come from them as well.

    Args:
        units: free units of this rank.
        shape: of the layers.
        demand: what requests will take, for admission.
        dtype: of K and V.
        kvcache: SGLang's pool.
        full_limit: most full slots in use at once (--max-total-tokens), or None. Where no layer is full they
            are positions that hold no bytes, and this is how many there are.

    Attributes:
        units, shape, demand: as given.
        sinks: allocates the rows of sink sets.
        sink_store: whose sets these are, once there is one.
        tree_cache: the prefix cache, once there is one.
        promised: units that the next batch was found to have.
        retractions: counters.
        full_is_limited: whether ``full_limit`` is given.
    """

    sink_store: SinkStore | None

    def __init__(
        self,
        units: UnitList,
        shape: UnitShape,
        demand: Demand,
        dtype: torch.dtype,
        kvcache: Any,
        full_limit: int | None,
    ) -> None:
        page, device = units.page_size, units.device
        self.units, self.shape, self.demand = units, shape, demand
        self.dtype, self.device, self.page_size, self.need_sort = dtype, device, page, False
        self.free_pages = self.release_pages = None
        self.free_group = None
        self._swa_req_ring, self._swa_ring_cost, self._req_to_token_pool = False, 0, None
        self._kvcache = kvcache
        self.sink_store = None
        self.tree_cache: Any = None
        self.promised = 0
        self.full_is_limited = full_limit is not None
        self.retractions = Retractions()
        self._short_of: str | None = None
        full_slots = units.rows
        if shape.full_units:
            self.full_attn_allocator: Any = SlotAllocator(
                units, shape.full_units, dtype, kvcache.full_kv_pool, full_limit
            )
        else:
            assert full_limit is not None
            full_slots = full_limit + page
            positions = TokenToKVPoolAllocator if page == 1 else _paged(page)
            self.full_attn_allocator = positions(
                full_limit, dtype=dtype, device=device, kvcache=kvcache.full_kv_pool, need_sort=False
            )
        self.swa_attn_allocator: Any = SlotAllocator(units, shape.streaming_units, dtype, kvcache.swa_kv_pool)
        self.sinks = SinkAllocator(self)
        self._size_full, self._size_swa = self.full_attn_allocator.size, self.swa_attn_allocator.size
        # The last -1 is SGLang's: a last_loc of -1 (no prefix) reads it.
        self.full_to_swa_index_mapping = torch.zeros(full_slots + 1, dtype=torch.int64, device=device)
        self.full_to_swa_index_mapping[-1] = -1
        self.clear()
        kvcache.register_mapping(self.full_to_swa_index_mapping)

    @property
    def full_used(self) -> int:
        """Full slots in use."""
        allocator = self.full_attn_allocator
        if isinstance(allocator, SlotAllocator):
            return allocator.used
        return int(allocator.size - allocator.available_size())

    def available_size(self) -> int:
        """Tokens that can get a slot of each kind now."""
        both = self.shape.full_units + self.shape.streaming_units
        return int(
            min(
                len(self.units) // both * self.page_size,
                self.full_available_size(),
                self.swa_available_size(),
            )
        )

    def new_pages_available(self, num_full_pages: int, num_swa_pages: int) -> bool:
        """Whether so many pages of each kind can be had together."""
        return bool(
            self.shape.units(num_full_pages, num_swa_pages) <= len(self.units)
            and num_full_pages * self.page_size <= self.full_available_size()
        )

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """As SWATokenToKVPoolAllocator."""
        self._settle()
        return super().alloc(need_size) if self.new_pages_available(need_size, need_size) else None

    def alloc_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """As SWATokenToKVPoolAllocator."""
        self._settle()
        return super().alloc_extend(*args, **kwargs)

    def alloc_decode(self, seq_lens: Any, seq_lens_cpu: Any, last_loc: Any) -> torch.Tensor | None:
        """As SWATokenToKVPoolAllocator."""
        self._settle()
        new = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        if not self.new_pages_available(new, new):
            return None
        return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)

    def swa_capacity_and_available(
        self, *, full_capacity: int, swa_capacity: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """(capacity, available) of both sides; each may have all units that are free."""
        full, streaming = self.full_available_size(), self.swa_available_size()
        return (self.full_used + full, full), (self.swa_attn_allocator.used + streaming, streaming)

    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> UnitBudget:
        """Both sides priced in units."""
        self._settle()
        return UnitBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def _settle(self) -> None:
        """What was promised to a batch is taken, or a new batch is formed."""
        self.promised = 0
        if self.sink_store is not None:
            self.sink_store.settle()

    def evictable_units(self, tree_cache: Any) -> int:
        """Units that the prefix cache and stored sink sets would give back."""
        tokens = self.shape.units(tree_cache.full_evictable_size(), tree_cache.swa_evictable_size())
        store = self.sink_store
        return tokens // self.page_size + (0 if store is None else store.droppable * self.units_of_sinks)

    @property
    def units_of_sinks(self) -> int:
        """Units of a sink set."""
        store = self.sink_store
        return 0 if store is None else self.shape.units(0, store.slots_of_set // self.page_size)

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> None:
        """Evict what lies longest until ``num_tokens`` tokens can get a slot of each kind."""
        if tree_cache is None or not tree_cache.supports_prefix_sharing():
            return
        pages = -(-num_tokens // self.page_size)
        need = self.shape.units(pages, pages)
        if len(self.units) < need and self.sink_store is not None:
            # Sinks are worth keeping beside a cached window only.
            windows = -(-tree_cache.swa_evictable_size() // self.demand.window)
            self.sink_store.trim(keep=windows, until=lambda: len(self.units) >= need)
        self._evict(tree_cache, need, full_slots=pages * self.page_size)
        if len(self.units) < need and self.sink_store is not None:
            self.sink_store.trim(keep=0, until=lambda: len(self.units) >= need)

    def make_spare(self, units: int, *, drop_sinks: bool = False) -> bool:
        """Whether ``units`` can be taken now and the next batch still has its own; evicts cached tokens.

        drop_sinks: and, if that is not enough, unused sink sets.
        """
        need, tree = self.promised + units, self.tree_cache
        if len(self.units) >= need or tree is None or not tree.supports_prefix_sharing():
            return len(self.units) >= need
        if len(self.units) + self.evictable_units(tree) >= need:
            grouped = self.free_group is not None  # SGLang frees in groups to save launches
            if grouped:
                self.free_group_end()
            self._evict(tree, need, full_slots=0)
            if grouped:
                self.free_group_begin()
            if drop_sinks and self.sink_store is not None:
                self.sink_store.trim(keep=0, until=lambda: len(self.units) >= need)
        return len(self.units) >= need

    def _evict(self, tree_cache: Any, need: int, full_slots: int) -> None:
        """A cached token that goes takes its window along, so full slots are asked for first."""
        short = need - len(self.units)
        over = full_slots - self.full_available_size()
        if short <= 0 and over <= 0:
            return
        shape, page = self.shape, self.page_size
        full_evictable = tree_cache.full_evictable_size()
        full = max(over, 0)
        if shape.full_units:
            full = max(full, -(-short // shape.full_units) * page)
        full = min(full, full_evictable)
        left = max(short - full // page * shape.full_units, 0)
        streaming = min(-(-left // shape.streaming_units) * page, tree_cache.swa_evictable_size())
        tree_cache.evict_for_alloc(
            EvictParams(num_tokens=full, swa_num_tokens=streaming),
            allocation_reclaim_satisfied=lambda: (
                len(self.units) >= need and self.full_available_size() >= full_slots
            ),
        )

    def check_decode_capacity(self, *, num_tokens: int, **given: Any) -> bool:
        """As BaseTokenToKVPoolAllocator; remembers what a step that must retract was short of."""
        fits = bool(super().check_decode_capacity(num_tokens=num_tokens, **given))
        pages = -(-num_tokens // self.page_size)
        self.promised = self.shape.units(pages, pages)
        limited = self.full_is_limited and self.size_full - self.full_used < num_tokens
        self._short_of = None if fits else "limit" if limited else "memory"
        return fits

    def count_retraction(self) -> None:
        """A request gives its slots back before it is done."""
        cause = self._short_of or "other"
        setattr(self.retractions, cause, getattr(self.retractions, cause) + 1)

    def max_new_tokens_for_memory(
        self,
        input_tokens: int,
        max_new_tokens: int,
        *,
        token_capacity: int,
        sliding_window_size: int | None,
        chunk_size: int | None,
    ) -> int | None:
        """As BaseTokenToKVPoolAllocator: what one request may output if it has the memory for itself."""
        longest = self.demand.longest(self.units.size, self.size_full)
        if input_tokens + self.page_size > longest:
            return None
        return max(0, min(max_new_tokens, longest - input_tokens - self.page_size))

    def clear(self) -> None:
        """As SWATokenToKVPoolAllocator; sink rows are gone as well."""
        if self.sink_store is not None:
            assert not self.sink_store.used, "sink sets in use while all slots are freed"
        self.units.clear()
        self.sinks.clear()
        super().clear()

    def resize(self, config: Any) -> None:
        """Not supported: SGLang calls it for pools that are sized after graphs are captured."""
        raise LightTransferError("KV pools: lazy layers need pools of a known size (post-capture sizing)")


def _paged(page: int) -> Callable[..., PagedTokenToKVPoolAllocator]:
    return lambda size, **given: PagedTokenToKVPoolAllocator(size // page * page, page, **given)
