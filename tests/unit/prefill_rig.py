"""One scheduler's worth of memory without a model: real pools, real tree, real requests, on the CPU.

Does with a request what SGLang's scheduler does (schedule_batch.py, scheduler.py, mem_cache/common.py), chunk
by chunk and token by token, through SGLang's own functions and the hooks of hooks/table.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.sampling.sampling_params import SamplingParams

from lt_sglang.cache.radix_dynamic import DynamicRadixCache
from lt_sglang.cache.radix_static import LightTransferRadixCache
from lt_sglang.config import LightTransferConfig
from lt_sglang.hooks.wrappers import slide_after_chunk
from lt_sglang.layers.layer_sets import LayerSetStore
from lt_sglang.layers.prefill import PrefillTracker
from lt_sglang.memory.budget import UnitBudget
from lt_sglang.memory.kv_keys import request_id
from tests.pools import make_pools

ROWS = 16
CONTEXT = 20_000


@dataclass
class Rig:
    """Memory of ``units`` units for one full and one lazy layer, at most ``sets`` sets of ``sinks`` sinks.

    window: SGLang's sliding_window_size, so w_recent - 1. hooked: whether hooks/table.py is in force.
    """

    units: int
    window: int = 15
    sinks: int = 4
    sets: int = 8
    chunk: int = 32
    interval: int = 8
    disabled: bool = False
    hooked: bool = True
    most: int = 0
    running: list[Req] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pools = make_pools(
            self.units,
            self.sets,
            self.sinks,
            requests=ROWS,
            context=CONTEXT,
            window=self.window + 1,
            chunked_prefill_size=self.chunk,
        )
        self.rows, self.allocator, self.store = self.pools.rows, self.pools.allocator, self.pools.sinks
        self.tree = self.make_tree(self.pools.cache_params(self.window, self.disabled))
        self.made = 0

    def make_tree(self, params: CacheInitParams) -> LightTransferRadixCache:
        """The tree under test."""
        return LightTransferRadixCache(params, self.store)

    @property
    def streaming_used(self) -> int:
        """Streaming slots that cannot be had by eviction."""
        used: int = self.allocator.swa_attn_allocator.used
        return used - self.tree.swa_evictable_size()

    def request(self, prompt: Sequence[int], new_tokens: int = 64, *, barred: bool = False) -> Req:
        """A request that waits; ``barred``: as SGLang bars one from the tree."""
        self.made += 1
        parameters = SamplingParams(max_new_tokens=new_tokens)
        req = Req(f"r{self.made}", "", array("q", prompt), parameters)
        req.skip_radix_cache_insert = barred
        return req

    def admit(self, req: Req) -> None:
        """Match its prefix and lock it; it gets a row."""
        req.init_next_round_input(self.tree)
        req.lock = self.tree.lock(req.last_node)
        self.rows.alloc([req])
        self.running.append(req)
        if req.prefix_len:
            prefix = self.tree.prefix_device_indices(req)[: req.prefix_len]
            self.rows.write((req.kv.req_pool_idx, slice(0, req.prefix_len)), prefix)

    def begin_forward(self, req: Req) -> None:
        """What a model runner hears before the forward of a chunk."""

    def is_admitted(self, req: Req) -> bool:
        """Whether SGLang starts ``req``, matched and locked (PrefillAdder.add_one_req); nothing else runs."""
        fits, limit = self._budget(req).check_prefill(chunk_limit=self.chunk)
        return fits and limit is not None and limit > 0

    def chunk_fits(self, req: Req) -> int:
        """Tokens of the next chunk; 0 where SGLang parks the request (PrefillAdder.add_chunked_req)."""
        left = len(req.full_untruncated_fill_ids) - req.prefix_len
        limit = self._budget(req).fit_chunk(extend_input_len=left, max_new_tokens=0, chunk_limit=self.chunk)
        return min(left, limit or 0)

    def _budget(self, req: Req) -> UnitBudget:
        budget = self.allocator.create_prefill_budget(self.tree)
        budget.consider(req, SimpleNamespace(running_batch=None, new_token_ratio=1.0))
        return budget

    def run_chunk(self, req: Req) -> bool:
        """One chunk, and the scheduler's bookkeeping behind it; False if the request is parked."""
        count = self.chunk_fits(req)
        if not count:
            return False
        req.extend_end = req.prefix_len + count
        self._allocate(req, count)
        self.begin_forward(req)
        last = req.extend_end == len(req.full_untruncated_fill_ids)
        if last:
            req.output_ids.append(7)
        if self.hooked:
            slide_after_chunk(checkpoint_kv_cache, req, self.tree)
        else:
            checkpoint_kv_cache(req, self.tree)
        self.flush()
        return True

    def prefill(self, req: Req) -> bool:
        """All chunks; False if it never starts, or is parked on the way, with nothing else running."""
        self.admit(req)
        if not self.is_admitted(req):
            return False
        while req.prefix_len < len(req.full_untruncated_fill_ids) - len(req.output_ids):
            if not self.run_chunk(req):
                return False
        return True

    def decode(self, req: Req, steps: int) -> bool:
        """``steps`` new tokens; False if memory ran out."""
        for _ in range(steps):
            due = req.seqlen - 1 - self.window >= req.kv.get_evicted_seqlen(ComponentType.SWA) + self.interval
            if req.decode_batch_idx >= 1 and due:
                self.tree.evict_sliding_windows(req, req.seqlen - 1)
            self.allocator.evict_to_free_tokens(self.tree, 1)
            if self.allocator.available_size() < 1:
                return False
            self._allocate(req, 1)
            req.decode_batch_idx += 1
            req.output_ids.append(len(req.output_ids) % 50 + 60)
            self.flush()
        return True

    def finish(self, req: Req) -> None:
        """It has all its tokens, and gives back what it holds."""
        req.finished_reason = FINISH_LENGTH(len(req.output_ids))
        release_kv_cache(req, self.tree, checkpoint=True)
        self._gone(req)

    def retract(self, req: Req) -> None:
        """Thrown out: nothing of it is kept."""
        release_kv_cache(req, self.tree, checkpoint=False)
        self._gone(req)

    def flush(self) -> None:
        """What the next forward does first."""
        self.store.flush(self.pools.flat.copy_rows)

    def check(self) -> None:
        """Every slot has one owner: tree, running request, free list. Raises AssertionError."""
        self.tree.sanity_check()
        mapping = self.allocator.full_to_swa_index_mapping
        owned_full, owned_streaming = 0, 0
        for req in self.running:
            row = self.rows.req_to_token[req.kv.req_pool_idx]
            slots = row[req.kv.cache_protected_len : req.kv.kv_allocated_len].to(torch.int64)
            owned_full += len(slots)
            owned_streaming += int((mapping[slots] > 0).sum())
        full, streaming = self.tree.full_evictable_size(), self.tree.swa_evictable_size()
        full += self.tree.full_protected_size()
        streaming += self.tree.swa_protected_size()
        assert owned_full + full == self.allocator.full_used
        assert owned_streaming + streaming == self.allocator.swa_attn_allocator.used
        sinks = self.store.used * self.sinks
        assert owned_full + full + owned_streaming + streaming + sinks == self.units - len(
            self.allocator.units
        )

    def sinks_of(self, req: Req) -> list[int]:
        """Streaming slots that a lazy layer reads for the first positions; 0: none."""
        row = req.kv.req_pool_idx
        sink_set = int(self.store.set_of[row])
        if sink_set >= 0:
            return list(self.store.slots_of[sink_set].tolist())
        slots = self.rows.req_to_token[row, : self.sinks].to(torch.int64)
        found: list[int] = self.allocator.full_to_swa_index_mapping[slots].tolist()
        return found

    def window_of(self, req: Req) -> list[int]:
        """Streaming slots of the last positions, which the next token sees; 0: none."""
        row, end = req.kv.req_pool_idx, req.kv.kv_allocated_len
        slots = self.rows.req_to_token[row, max(0, end - self.window) : end].to(torch.int64)
        found: list[int] = self.allocator.full_to_swa_index_mapping[slots].tolist()
        return found

    def _allocate(self, req: Req, count: int) -> None:
        self.allocator.evict_to_free_tokens(self.tree, count)
        slots = self.allocator.alloc(count)
        assert slots is not None, "the chunk was measured to fit"
        start = req.kv.kv_allocated_len or req.prefix_len
        self.rows.write((req.kv.req_pool_idx, slice(start, start + count)), slots.to(torch.int32))
        req.kv.kv_allocated_len = req.kv.kv_committed_len = start + count
        self.most = max(self.most, self.streaming_used)

    def _gone(self, req: Req) -> None:
        self.running = [other for other in self.running if other is not req]
        self.flush()


@dataclass
class DynamicRig(Rig):
    """The same in dynamic mode: six layers, three lazy, decided at the prompt's end or past ``undecided``."""

    undecided: int = CONTEXT

    def make_tree(self, params: CacheInitParams) -> DynamicRadixCache:
        """The tree of dynamic mode."""
        config = LightTransferConfig(
            (0, 4, 5),
            mode="dynamic",
            sink_tokens=self.sinks,
            recent_tokens=self.window + 1,
            keep=3,
        )
        sets = LayerSetStore(4 * ROWS, config.lazy_layers, 6, ROWS + 1, "cpu")
        self.prefills = PrefillTracker(config, sets, self.undecided)
        return DynamicRadixCache(params, self.store, self.prefills)

    def begin_forward(self, req: Req) -> None:
        """Layers are planned before each chunk."""
        self.prefills.begin([(request_id(req), req)])
