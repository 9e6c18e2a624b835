"""The prefix caches over SGLang's own allocator, pools and requests, on a CPU and without a model.

K and V are tags: a whole number that says which tokens, of which owner, layer set and weights, a row was
computed for. So a read of a wrong row shows.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.sampling.sampling_params import SamplingParams

from lt_sglang.attention.indices import StreamingTables, Windows
from lt_sglang.cache.radix_dynamic import DynamicRadixCache
from lt_sglang.cache.radix_static import LightTransferRadixCache
from lt_sglang.config import LightTransferConfig
from lt_sglang.layers.layer_sets import LayerSetStore
from lt_sglang.layers.prefill import PrefillTracker
from tests.pools import make_pools

CONTEXT = 128


@dataclass(frozen=True)
class Sizes:
    """Of caches to build. sink, recent: w_sink, w_recent. full, streaming: slots. rows: of req_to_token."""

    sink: int = 2
    recent: int = 6
    full: int = 160
    streaming: int = 64
    sets: int = 8
    rows: int = 6
    layer_sets: int = 10
    chunk: int = 10
    dynamic: bool = False
    disable: bool = False

    @property
    def config(self) -> LightTransferConfig:
        """As a server would have it."""
        given: dict[str, Any] = {"mode": "dynamic", "keep": 1, "staging_tokens": 40} if self.dynamic else {}
        return LightTransferConfig((1,), sink_tokens=self.sink, recent_tokens=self.recent, **given)


class Caches:
    """A cache as SGLang's scheduler holds it, and the tables and buffers that a forward reads."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.config = sizes, sizes.config
        pools = make_pools(
            sizes.full,
            sizes.streaming,
            sizes.sets,
            sizes.sink,
            requests=sizes.rows,
            context=CONTEXT,
            dtype=torch.int64,
            chunked_prefill_size=sizes.chunk,
        )
        self.rows, self.allocator, self.sinks = pools.rows, pools.allocator, pools.sinks
        self.full, self.streaming = pools.kv.full_kv_pool.k_buffer[0], pools.kv.swa_kv_pool.k_buffer[0]
        self.windows = Windows(sizes.sink, sizes.recent, sink_base=sizes.streaming + 1)
        params = pools.cache_params(self.config.retained_tokens - 1, sizes.disable)
        self.prefills: PrefillTracker | None = None
        if sizes.dynamic:
            sets = LayerSetStore(sizes.layer_sets, (1,), 2, len(self.sinks.set_of), "cpu")
            self.prefills = PrefillTracker(self.config, CONTEXT, sets)
            self.tree: LightTransferRadixCache = DynamicRadixCache(params, self.sinks, self.prefills)
        else:
            self.tree = LightTransferRadixCache(params, self.sinks)

    @property
    def tables(self) -> StreamingTables:
        """As LightTransferModelRunner.streaming_tables."""
        return StreamingTables(
            self.rows.req_to_token, self.allocator.full_to_swa_index_mapping, self.sinks.set_of
        )

    def flush(self) -> None:
        """What LightTransferModelRunner.forward does before the forward."""

        def copy(target: torch.Tensor, source: torch.Tensor) -> None:
            self.streaming[target] = self.streaming[source]

        self.sinks.flush(self.windows.sink_base, copy)
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
    """Every slot, sink set and row has one owner, in range; ``requests``: all that may hold any."""
    sizes, mapping = caches.sizes, caches.allocator.full_to_swa_index_mapping.tolist()
    assert mapping[0] == 0 and mapping[-1] == -1
    held = [req for req in requests if req.kv.holds_kv]
    table = caches.rows.req_to_token
    full_free = caches.allocator.full_attn_allocator.free_pages.tolist()
    streaming_free = caches.allocator.swa_attn_allocator.free_pages.tolist()
    for allocator in (caches.allocator.full_attn_allocator, caches.allocator.swa_attn_allocator):
        assert not len(allocator.release_pages), "sorted allocators only"
    tree = [] if sizes.disable else caches.tree.all_values_flatten().tolist()
    owned: list[int] = []
    for req in held:
        row = table[req.kv.req_pool_idx].tolist()
        own = row[req.kv.cache_protected_len : req.kv.kv_allocated_len]
        owned += own
        assert set(row[: req.kv.cache_protected_len]) <= set(tree)
        # What its window has left has no streaming slot, all else has one.
        gone = range(req.kv.swa_dead_lo(1), req.kv.get_evicted_seqlen(ComponentType.SWA))
        for position in range(req.kv.cache_protected_len, req.kv.kv_allocated_len):
            assert (mapping[row[position]] == 0) == (position in gone), (req.rid, position, gone)
    assert sorted(full_free + tree + owned) == list(range(1, sizes.full + 1)), "full slots"
    assert not any(mapping[slot] for slot in full_free)
    live = [mapping[slot] for slot in tree + owned if mapping[slot]]
    assert sorted(streaming_free + live) == list(range(1, sizes.streaming + 1)), "streaming slots"
    rows = [req.kv.req_pool_idx for req in held]
    assert sorted(rows + list(caches.rows.free_slots)) == list(range(1, table.shape[0])), "rows"
    assert caches.sinks.check_integrity() == []
    caches.tree.sanity_check()


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
