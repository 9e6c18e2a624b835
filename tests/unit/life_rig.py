"""One scheduler's worth of memory without a model: real pools, real tree, real requests, on the CPU.

Does with a request what SGLang's scheduler does (schedule_batch.py, scheduler.py, mem_cache/allocation.py and
common.py), chunk by chunk and token by token, through SGLang's own functions, its PrefillAdder included, and
the hooks of hooks/table.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.mem_cache.allocation import alloc_for_decode, alloc_for_extend
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams

from lt_sglang.cache.radix_dynamic import DynamicRadixCache
from lt_sglang.cache.radix_static import LightTransferRadixCache
from lt_sglang.config import LightTransferConfig
from lt_sglang.hooks import wrappers
from lt_sglang.layers.full_rows import FullRows
from lt_sglang.layers.layer_sets import LayerSetStore
from lt_sglang.layers.prefill import PrefillTracker
from lt_sglang.memory.kv_keys import request_id
from lt_sglang.memory.units import UnitShape
from tests.pools import ONE_EACH, make_pools

ROWS = 16
CONTEXT = 20_000


class HookedAdder(PrefillAdder):
    """SGLang's, with what hooks/table.py wraps."""

    def _select_prefill_admission(self, req: Req, **given: Any) -> Any:
        return wrappers.select_admission(PrefillAdder._select_prefill_admission, self, req, **given)

    def add_one_req_ignore_eos(self, req: Req) -> Any:
        return wrappers.add_ignore_eos(PrefillAdder.add_one_req_ignore_eos, self, req)

    def add_chunked_req(self, req: Req) -> Any:
        return wrappers.add_chunk(PrefillAdder.add_chunked_req, self, req)

    def _get_running_request_total_token_offset(self, req: Req) -> Any:
        stock = PrefillAdder._get_running_request_total_token_offset
        return wrappers.running_offset(stock, self, req)


@dataclass
class Rig:
    """Memory of ``units`` units, and room for ``sets`` sink sets of ``sinks`` rows.

    window: SGLang's sliding_window_size, so w_recent - 1. hooked: whether the window slides after each chunk
    as hooks/table.py has it. most: units that could not be had by eviction, at most. most_streaming: slots.
    """

    units: int
    window: int = 15
    sinks: int = 4
    sets: int = 8
    chunk: int = 32
    interval: int = 8
    shape: UnitShape = ONE_EACH
    page: int = 1
    limit: int | None = None
    context: int = CONTEXT
    disabled: bool = False
    hooked: bool = True
    most: int = 0
    most_streaming: int = 0
    running: list[Req] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pools = make_pools(
            self.units,
            self.sets,
            self.sinks,
            requests=ROWS,
            context=self.context,
            shape=self.shape,
            page_size=self.page,
            window=self.window + 1,
            full_limit=self.limit,
            chunked_prefill_size=self.chunk,
        )
        self.rows, self.allocator, self.store = self.pools.rows, self.pools.allocator, self.pools.sinks
        self.allocator.demand = replace(
            self.allocator.demand, interval=self.interval, sink_tokens=self.sinks, undecided=self.undecided
        )
        self.tree = self.make_tree(self.pools.cache_params(self.window, self.disabled))
        self.made = 0

    undecided = 0

    def make_tree(self, params: CacheInitParams) -> LightTransferRadixCache:
        """The tree under test."""
        return LightTransferRadixCache(params, self.store)

    @property
    def units_used(self) -> int:
        """Units that cannot be had by eviction."""
        return self.units - len(self.allocator.units) - self.allocator.evictable_units(self.tree)

    @property
    def streaming_used(self) -> int:
        """Streaming slots of the same, without those of sink sets."""
        return self.allocator.swa_attn_allocator.used - self.tree.swa_evictable_size()

    def request(
        self, prompt: Sequence[int], new_tokens: int = 64, *, barred: bool = False, **sampling: Any
    ) -> Req:
        """A request that waits; ``barred``: as SGLang bars one from the tree."""
        self.made += 1
        parameters = SamplingParams(max_new_tokens=new_tokens, **sampling)
        req = Req(f"r{self.made}", "", array("q", prompt), parameters)
        req.skip_radix_cache_insert = barred
        return req

    def adder(self, ratio: float = 1.0) -> HookedAdder:
        """Of a prefill pass that begins now."""
        decoding = [req for req in self.running if req.output_ids]
        return HookedAdder(
            page_size=self.page,
            tree_cache=self.tree,
            token_to_kv_pool_allocator=self.allocator,
            running_batch=SimpleNamespace(reqs=decoding, batch_size=lambda: len(decoding)),  # type: ignore[arg-type]
            new_token_ratio=ratio,
            rem_input_tokens=1 << 20,
            rem_chunk_tokens=self.chunk,
        )

    def begin_forward(self, req: Req) -> None:
        """What a model runner hears before the forward of a chunk."""

    def start(self, req: Req) -> bool:
        """Its first chunk; False if SGLang lets it wait."""
        req.init_next_round_input(self.tree)
        adder = self.adder()
        adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
        if not adder.can_run_list:
            return False
        self.running.append(req)
        self._extend(req)
        return True

    def run_chunk(self, req: Req) -> bool:
        """The next one; False if it is parked."""
        req.refresh_fill_ids()
        adder = self.adder()
        adder.add_chunked_req(req)
        if not adder.can_run_list:
            return False
        self._extend(req)
        return True

    def prefill(self, req: Req) -> bool:
        """All chunks; False if it never starts, or is parked on the way, with nothing else running."""
        if not self.start(req):
            return False
        while not req.output_ids:
            if not self.run_chunk(req):
                return False
        return True

    def decode(self, req: Req, steps: int) -> bool:
        """``steps`` new tokens; False if memory ran out."""
        for _ in range(steps):
            due = req.seqlen - 1 - self.window >= req.kv.get_evicted_seqlen(ComponentType.SWA) + self.interval
            if req.decode_batch_idx >= 1 and due:
                self.tree.evict_sliding_windows(req, req.seqlen - 1)
            new = self.page if (req.seqlen - 1) % self.page == 0 else 0
            if not self.allocator.check_decode_capacity(num_tokens=new, tree_cache=self.tree):
                return False
            batch = self._batch(req, ForwardMode.DECODE)
            batch.seq_lens = batch.seq_lens_cpu = torch.tensor([req.seqlen - 1])
            batch.orig_seq_lens = batch.seq_lens
            alloc_for_decode(batch, token_per_req=1)
            req.kv.kv_committed_len = req.seqlen
            req.decode_batch_idx += 1
            req.output_ids.append(len(req.output_ids) % 50 + 60)
            self._measure()
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
        """Every slot has one owner: tree, running request, sink set, free list. Raises AssertionError."""
        self.tree.sanity_check()
        mapping, allocator = self.allocator.full_to_swa_index_mapping, self.allocator
        full, streaming = self._pages(self.tree.full_evictable_size() + self.tree.full_protected_size()), 0
        streaming += self._pages(self.tree.swa_evictable_size() + self.tree.swa_protected_size())
        for req in self.running:
            row = self.rows.req_to_token[req.kv.req_pool_idx]
            slots = row[req.kv.cache_protected_len : req.kv.kv_allocated_len].to(torch.int64)
            full += len(set((slots // self.page).tolist()))
            streaming += len({slot // self.page for slot in mapping[slots].tolist() if slot})
        assert full * self.page == allocator.full_used
        assert streaming * self.page == allocator.swa_attn_allocator.used
        sinks = self.store.used * self.store.slots_of_set // self.page if self.sinks else 0
        assert len(allocator.units) + self.shape.units(full, streaming + sinks) == self.units

    def sinks_of(self, req: Req) -> list[int]:
        """Streaming slots that a lazy layer reads for the first positions; 0: none."""
        row = req.kv.req_pool_idx
        sink_set = int(self.store.set_of[row])
        if sink_set >= 0:
            stored: list[int] = self.store.slots_of[sink_set].tolist()
            return stored
        slots = self.rows.req_to_token[row, : self.sinks].to(torch.int64)
        found: list[int] = self.allocator.full_to_swa_index_mapping[slots].tolist()
        return found

    def window_of(self, req: Req) -> list[int]:
        """Streaming slots of the last positions, which the next token sees; 0: none."""
        row, end = req.kv.req_pool_idx, req.kv.kv_allocated_len
        slots = self.rows.req_to_token[row, max(0, end - self.window) : end].to(torch.int64)
        found: list[int] = self.allocator.full_to_swa_index_mapping[slots].tolist()
        return found

    def _pages(self, tokens: int) -> int:
        assert tokens % self.page == 0
        return tokens // self.page

    def _batch(self, req: Req, mode: ForwardMode) -> ScheduleBatch:
        batch = ScheduleBatch(
            reqs=[req],
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            device="cpu",
            enable_overlap=False,
            model_config=SimpleNamespace(is_encoder_decoder=False),  # type: ignore[arg-type]
        )
        batch.forward_mode = mode
        if mode == ForwardMode.DECODE:
            batch.req_pool_indices = torch.tensor([req.kv.req_pool_idx])
        return batch

    def _extend(self, req: Req) -> None:
        """The chunk that was admitted, and the scheduler's bookkeeping behind it."""
        batch = self._batch(req, ForwardMode.EXTEND)
        batch.prefix_lens, batch.extend_lens = [req.prefix_len], [req.extend_len]
        batch.seq_lens = batch.seq_lens_cpu = torch.tensor([req.extend_end])
        batch.extend_num_tokens = req.extend_len
        alloc_for_extend(batch)
        req.extend_batch_idx += 1
        self._measure()
        self.begin_forward(req)
        last = req.extend_end == len(req.full_untruncated_fill_ids)
        if self.hooked:
            wrappers.slide_after_chunk(checkpoint_kv_cache, req, self.tree)
        else:
            checkpoint_kv_cache(req, self.tree)
        if last:
            req.output_ids.append(7)
        self.flush()

    def _measure(self) -> None:
        self.most = max(self.most, self.units_used)
        self.most_streaming = max(self.most_streaming, self.streaming_used)

    def _gone(self, req: Req) -> None:
        self.running = [other for other in self.running if other is not req]
        self.flush()


@dataclass
class DynamicRig(Rig):
    """The same in dynamic mode: decided at the prompt's end, or at the chunk that passes ``undecided``."""

    undecided: int = CONTEXT

    def make_tree(self, params: CacheInitParams) -> DynamicRadixCache:
        """The tree of dynamic mode."""
        layers, keep = self.shape.layers, self.shape.full_layers
        config = LightTransferConfig(
            tuple(range(keep, layers)),
            mode="dynamic",
            sink_tokens=self.sinks,
            recent_tokens=self.window + 1,
            keep=keep,
        )
        sets = LayerSetStore(4 * ROWS, config.lazy_layers, layers, ROWS + 1, "cpu")
        self.prefills = PrefillTracker(config, sets, self.undecided)
        mapping = params.token_to_kv_pool_allocator.full_to_swa_index_mapping
        return DynamicRadixCache(params, self.store, self.prefills, FullRows(len(mapping), "cpu"))

    def begin_forward(self, req: Req) -> None:
        """Layers are planned before each chunk."""
        self.prefills.begin([(request_id(req), req)])
