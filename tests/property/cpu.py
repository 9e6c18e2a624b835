"""The prefix caches over our allocator, SGLang's pools and requests, on a CPU and without a model.

K and V are tags: a whole number that says which tokens, of which owner, layer set and weights, a row was
computed for, and in which bank. So a read of a wrong row shows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.sampling.sampling_params import SamplingParams

from lt_sglang.attention.indices import StreamingTables, Windows
from lt_sglang.cache.radix_dynamic import DynamicRadixCache
from lt_sglang.cache.radix_static import LightTransferRadixCache
from lt_sglang.config import LIST, LightTransferConfig
from lt_sglang.layers.full_rows import FullRows
from lt_sglang.layers.layer_sets import LayerSetStore
from lt_sglang.layers.prefill import PrefillTracker
from lt_sglang.memory.units import UnitShape
from tests.pools import make_pools

CONTEXT = 128
UNDECIDED = 40
BANK = 1 << 56  # above all tags


@dataclass(frozen=True)
class Sizes:
    """Of caches to build. sink, recent: w_sink, w_recent. full: layers; lazy: layers. rows: of req_to_token.

    units: of ``page`` tokens. listed: dynamic mode with a list.
    """

    sink: int = 2
    recent: int = 6
    full: int = 1
    lazy: int = 1
    page: int = 1
    units: int = 220
    limit: int | None = None
    sets: int = 8
    rows: int = 6
    layer_sets: int = 10
    chunk: int = 10
    dynamic: bool = False
    listed: bool = False
    disable: bool = False

    @property
    def config(self) -> LightTransferConfig:
        """As a server would have it."""
        given: dict[str, Any] = {"mode": "dynamic", "keep": self.full} if self.dynamic else {}
        given |= {"score": LIST} if self.listed else {}
        lazy = tuple(range(self.full, self.full + self.lazy))
        return LightTransferConfig(lazy, sink_tokens=self.sink, recent_tokens=self.recent, **given)

    @property
    def shape(self) -> UnitShape:
        """Of the layers."""
        return UnitShape(self.full, self.lazy)


class Caches:
    """A cache as SGLang's scheduler holds it, and the tables and buffers that a forward reads."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.config = sizes, sizes.config
        pools = make_pools(
            sizes.units,
            sizes.sets,
            sizes.sink,
            requests=sizes.rows,
            context=CONTEXT,
            shape=sizes.shape,
            page_size=sizes.page,
            window=self.config.retained_tokens,
            full_limit=sizes.limit,
            dtype=torch.int64,
            chunked_prefill_size=sizes.chunk,
        )
        self.rows, self.allocator, self.sinks, self.flat = (
            pools.rows,
            pools.allocator,
            pools.sinks,
            pools.flat,
        )
        self.windows = Windows(sizes.sink, sizes.recent)
        params = pools.cache_params(self.config.retained_tokens - 1, sizes.disable)
        self.prefills: PrefillTracker | None = None
        if sizes.dynamic:
            layers = sizes.shape.layers
            sets = LayerSetStore(
                sizes.layer_sets, self.config.lazy_layers, layers, len(self.sinks.set_of), "cpu"
            )
            self.prefills = PrefillTracker(self.config, sets, UNDECIDED)
            self.full_rows = FullRows(len(self.allocator.full_to_swa_index_mapping), "cpu")
            self.tree: LightTransferRadixCache = DynamicRadixCache(
                params, self.sinks, self.prefills, self.full_rows
            )
        else:
            self.tree = LightTransferRadixCache(params, self.sinks)

    @property
    def tables(self) -> StreamingTables:
        """As LightTransferModelRunner.streaming_tables."""
        return StreamingTables(
            self.rows.req_to_token,
            self.allocator.full_to_swa_index_mapping,
            self.sinks.set_of,
            self.sinks.slots_of,
        )

    def write(self, lazy: bool, slots: torch.Tensor, tags: torch.Tensor) -> None:
        """K of ``slots`` in every full, or every lazy, bank."""
        for bank in self._banks(lazy):
            self.flat.kv.k[self._rows(bank, slots), 0, 0] = tags + bank * BANK

    def read(self, lazy: bool, slots: torch.Tensor) -> torch.Tensor:
        """The tags of ``slots``, the same in every bank of the kind."""
        found = [self.flat.kv.k[self._rows(bank, slots), 0, 0] - bank * BANK for bank in self._banks(lazy)]
        assert all(torch.equal(tags, found[0]) for tags in found), "banks that hold other tokens"
        return found[0]

    def _banks(self, lazy: bool) -> range:
        shape = self.sizes.shape
        return range(shape.full_layers, shape.layers) if lazy else range(shape.full_layers)

    def _rows(self, bank: int, slots: torch.Tensor) -> torch.Tensor:
        return self.flat.layout.bank_rows(bank, slots, self.flat.units.rest)

    def flush(self) -> None:
        """What LightTransferModelRunner.forward does before the forward."""
        self.sinks.flush(self.flat.copy_rows)
        if self.prefills is not None:
            self.prefills.sets.flush()

    def clear(self) -> None:
        """As Scheduler.flush_cache; nothing may be running."""
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()


def request(rid: str, prompt: list[int], output: int = 4, asks: bool = False, **fields: Any) -> Req:
    """A request as the scheduler makes it; fields: of Req."""
    sampling = SamplingParams(max_new_tokens=output)
    sampling.custom_params = {"lighttransfer": True} if asks else None
    sampling.normalize(None)
    return Req(rid, "", array("q", prompt), sampling, vocab_size=1 << 30, **fields)


def audit(caches: Caches, requests: list[Req]) -> None:
    """Every unit, sink set and row has one owner, in range; ``requests``: all that may hold any."""
    sizes, mapping = caches.sizes, caches.allocator.full_to_swa_index_mapping.tolist()
    assert mapping[0] == 0 and mapping[-1] == -1
    held = [req for req in requests if req.kv.holds_kv]
    table, page = caches.rows.req_to_token, sizes.page
    tree = [] if sizes.disable else caches.tree.all_values_flatten().tolist()
    owned: list[int] = []
    for req in held:
        row = table[req.kv.req_pool_idx].tolist()
        assert req.kv.cache_protected_len % page == 0
        owned += row[req.kv.cache_protected_len : req.kv.kv_allocated_len]
        assert set(row[: req.kv.cache_protected_len]) <= set(tree)
        # What its window has left has no streaming slot, all else has one.
        gone = range(req.kv.swa_dead_lo(page), req.kv.get_evicted_seqlen(ComponentType.SWA))
        for position in range(req.kv.cache_protected_len, req.kv.kv_allocated_len):
            assert (mapping[row[position]] == 0) == (position in gone), (req.rid, position, gone)
    assert not set(owned) & set(tree) and len(set(owned)) == len(owned), "a slot with two owners"
    allocator, shape = caches.allocator, sizes.shape
    full = {slot // page for slot in tree + owned}
    streaming = [mapping[slot] for slot in tree + owned if mapping[slot]]
    assert len(set(streaming)) == len(streaming), "a streaming slot with two owners"
    live = {slot // page for slot in streaming}
    assert len(live) * page == allocator.swa_attn_allocator.used
    assert len(full) * page == allocator.full_used
    sinks = [slot // page for entry in caches.sinks._sets.values() for slot in entry.slots.tolist()[::page]]
    assert len(sinks) * page == allocator.sinks.used
    taken = units_of(caches, live, shape.streaming_units) + units_of(caches, sinks, shape.streaming_units)
    if shape.full_units:
        taken += units_of(caches, full, shape.full_units)
        assert not any(mapping[slot] for slot in range(len(mapping) - 1) if slot // page not in full)
    else:
        free = allocator.full_attn_allocator.free_pages.tolist()
        assert sorted([*free, *full]) == list(range(1, allocator.size_full // page + 1)), "positions"
    free = allocator.units.free.tolist()
    assert sorted(free + taken) == list(range(1, sizes.units + 1)), "units"
    rows = [req.kv.req_pool_idx for req in held]
    assert sorted(rows + list(caches.rows.free_slots)) == list(range(1, table.shape[0])), "rows"
    assert caches.sinks.check_integrity() == []
    caches.tree.sanity_check()


def units_of(caches: Caches, pages: Iterable[int], parts: int) -> list[int]:
    """The units of pages of so many each, given their first."""
    page, rest = caches.sizes.page, caches.flat.units.rest
    first = list(pages)
    others = [int(rest[part, unit * page]) // page for unit in first for part in range(parts - 1)]
    return first + others


def audit_stores(caches: Caches, held: list[Req]) -> None:
    """Whoever uses a sink set or a layer set holds K and V; device tables agree after a flush."""
    from lt_sglang.memory.kv_keys import request_id

    names = {request_id(req): req for req in held}
    users = [user for entry in caches.sinks._sets.values() for user in entry.users]
    assert len(users) == len(set(users)) == caches.sinks.requests and set(users) <= set(names)
    expected = {req.kv.req_pool_idx: -1 for req in held}
    for entry in caches.sinks._sets.values():
        assert 0 <= entry.index < caches.sizes.sets
        expected.update((names[user].kv.req_pool_idx, entry.index) for user in entry.users)
    found = caches.sinks.set_of.tolist()
    assert [found[row] for row in range(len(found))] == [expected.get(row, -1) for row in range(len(found))]
    if caches.prefills is not None:
        sets = caches.prefills.sets
        assert set(sets._of_request) <= set(names), "a request that is gone uses a layer set"
        rows = sets.set_of.tolist()
        for name, entry in sets._of_request.items():
            assert 0 <= entry.index < sets.capacity
            assert rows[names[name].kv.req_pool_idx] == entry.index
        taken = {req.kv.req_pool_idx for req in held}
        assert all(index == 0 for row, index in enumerate(rows) if row not in taken)
