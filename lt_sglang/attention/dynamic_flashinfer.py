"""Dynamic mode on a GPU: FlashInfer, one plan a step, and per-layer index lists.

Decode: one plan over every request's full length serves all layers; each layer then reads its own lists,
long ones where the request keeps full attention, short ones where it is lazy. The tensor-core kernel is right
and as fast with lists shorter than planned (the CUDA-core kernel is not).

A prefill whose requests are all undecided, or too short to have a window, is stock SGLang's: ragged attention
over the new tokens, another call over cached ones, merged. Any other prefill attends so for the requests that
are full in a layer (on FA2 in one paged call), and in a windowed paged call for those that are lazy there;
the lists of the others are empty. Nothing waits for the device.

Source: sglang/srt/layers/attention/flashinfer_backend.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper
from sglang.srt.layers.attention import flashinfer_backend as stock
from sglang.srt.layers.attention.flashinfer_backend import (
    DecodeMetadata,
    FlashInferAttnBackend,
    FlashInferIndicesUpdaterDecode,
)

from lt_sglang.attention.decode_plan import DecodePlan, GraphPlans, planned
from lt_sglang.attention.dynamic_prefill import PrefillPlanner
from lt_sglang.attention.flashinfer_plans import (
    LayerLists,
    by_head,
    host_indptr,
    is_replanned,
    plan_decode,
)
from lt_sglang.attention.gathered import GatheredAttention
from lt_sglang.attention.indices import Windows
from lt_sglang.attention.kernels.decode_dynamic import decode_lists, decode_pointers, write_rows
from lt_sglang.attention.kernels.merge_sinks import Banks, merge_sinks
from lt_sglang.attention.kernels.place import place
from lt_sglang.attention.kernels.store import store_rows
from lt_sglang.attention.kernels.tiles import Tiles
from lt_sglang.attention.prefix import PrefixAttention
from lt_sglang.errors import LightTransferError
from lt_sglang.identify.decider import Decider

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from lt_sglang.attention.dynamic_prefill import GatheredCall, PagedCall, PrefillMetadata
    from lt_sglang.attention.runner import HybridRunner


@dataclass(frozen=True)
class DecodeStep:
    """What the layers of one decode step share.

    write: int32 [L, bs or more], where new K and V go. plan, plans: under CUDA graphs each layer's own plan,
    uint8 [L, bytes]; else all layers run the wrapper's, made for the longest lists.
    """

    lists: LayerLists
    write: torch.Tensor
    plan: DecodePlan | None = None
    plans: torch.Tensor | None = None

    def attend(
        self, wrapper: Any, layer: int, query: torch.Tensor, kv_cache: Any, **options: Any
    ) -> torch.Tensor:
        """[requests, heads, dim] of one layer."""
        self.lists.use(wrapper, layer)
        how: AbstractContextManager[None] = nullcontext()
        if self.plan is not None and self.plans is not None:
            how = planned(wrapper, self.plan, self.plans[layer])
        with how:
            out: torch.Tensor = wrapper.forward(query, kv_cache, **options)
        return out


class DynamicFlashInferBackend(FlashInferAttnBackend):
    """FlashInferAttnBackend in which every request has lazy layers of its own."""

    def __init__(self, model_runner: HybridRunner) -> None:
        super().__init__(model_runner, init_new_workspace=model_runner.init_new_workspace)
        if not self.use_sliding_window_kv_pool or self.is_dllm_model or self.is_multimodal:
            raise LightTransferError(
                "attention backend: dynamic mode serves text models with hybrid KV pools"
            )
        assert model_runner.dynamic is not None
        self.runner = model_runner
        self.state = model_runner.dynamic
        # Only the tensor-core kernel may be planned longer than its lists are.
        self.decode_use_tensor_cores = True
        self.decode_wrappers = [
            BatchDecodeWithPagedKVCacheWrapper(
                self.workspace_buffer, "NHD", backend=self.decode_backend, use_tensor_cores=True
            )
        ]
        self.prefix = PrefixAttention(self.workspace_buffer)
        self.whole = GatheredAttention(self.workspace_buffer)
        recent_tokens = model_runner.lt_config.recent_tokens
        self.window = GatheredAttention(self.workspace_buffer, window_left=recent_tokens - 1)
        self.indices_updater_decode = DynamicDecodeUpdater(model_runner, self)
        self.prefill_planner = PrefillPlanner(model_runner, self)
        self.decider = Decider(self.state)
        self.prefill: PrefillMetadata | None = None
        self.step: DecodeStep | None = None
        self.graph_rows: torch.Tensor | None = None
        self._graph_pointers: torch.Tensor | None = None
        self._graph_write: torch.Tensor | None = None
        self.graph_plans: GraphPlans | None = None
        self._kv_cache = tuple(
            tensor.view(self.state.kv_dtype).unsqueeze(1)
            for tensor in (self.state.arena.keys, self.state.arena.values)
        )

    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None
    ) -> None:
        """As FlashInferAttnBackend, with one buffer for the lists of all layers."""
        super().init_cuda_graph_state(
            max_bs, max_num_tokens, torch.zeros(1, dtype=torch.int32, device="cuda")
        )
        layout, windows = self.state.layout, self.runner.windows()
        full = min(max_bs * self.max_context_len, 2 * layout.full_rows)
        # A graph's batch is filled up with rows of no request, one element a layer each.
        self._graph_padding = layout.layers * max_bs
        size = layout.full_banks * full + layout.streaming_banks * max_bs * windows.lazy_tokens
        self.graph_rows = torch.zeros(size + self._graph_padding, dtype=torch.int32, device="cuda")
        self._graph_pointers = torch.zeros(layout.layers * max_bs + 1, dtype=torch.int32, device="cuda")
        self._graph_write = torch.zeros((layout.layers, max_bs), dtype=torch.int32, device="cuda")
        self.graph_plans = GraphPlans(self, self.indices_updater_decode, layout.layers, max_bs)

    def fits_graph(self, forward_batch: ForwardBatch) -> bool:
        """Whether the lists of a decode batch fit the CUDA graphs' buffer (requests may share tokens)."""
        lengths = forward_batch.seq_lens_cpu
        if self.graph_rows is None or lengths is None:
            return True
        return self.list_size(lengths) + self._graph_padding <= len(self.graph_rows)

    def list_size(self, lengths: torch.Tensor) -> int:
        """Elements of all layers' lists for requests of ``lengths`` (host tensor)."""
        layout, windows = self.state.layout, self.runner.windows()
        short = int(lengths.clamp(max=windows.lazy_tokens).sum())
        return layout.full_banks * int(lengths.sum()) + layout.streaming_banks * short

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan a step that runs without a CUDA graph."""
        if forward_batch.forward_mode.is_decode_or_idle():
            super().init_forward_metadata(forward_batch)
            if self.step is not None and len(forward_batch.req_pool_indices):
                assert self.forward_metadata.swa_out_cache_loc is not None
                self._find_write_rows(forward_batch, self.forward_metadata.swa_out_cache_loc)
            return
        self.prefill = self.prefill_planner.plan(forward_batch)
        self.decider.begin(self.prefill.plans, self.prefill.popped, self.prefill.requests.full)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """As FlashInferAttnBackend; the write rows follow once the streaming slots are known."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self._find_write_rows(forward_batch, self.cuda_graph_swa_out_cache_loc)

    def _create_decode_wrappers(self, bs: int, num_tokens: int) -> list[Any]:
        assert self.graph_rows is not None
        return [
            BatchDecodeWithPagedKVCacheWrapper(
                self.workspace_buffer,
                "NHD",
                backend=self.decode_backend,
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=self.kv_indptr[0][: num_tokens + 1],
                paged_kv_indices_buffer=self.graph_rows,
                paged_kv_last_page_len_buffer=self.kv_last_page_len[:num_tokens],
            )
        ]

    def new_step(self, requests: int, lengths: torch.Tensor, graph: bool) -> DecodeStep:
        """Buffers for a decode step; those of the CUDA graphs, or new ones sized by ``lengths`` (host)."""
        layers = self.state.layout.layers
        if graph:
            assert self.graph_rows is not None
            assert self._graph_pointers is not None and self._graph_write is not None
            pointers = self._graph_pointers[: layers * requests + 1]
            lists = LayerLists(self.graph_rows, pointers, requests)
            self.step = DecodeStep(lists, self._graph_write)
            return self.step

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=self.workspace_buffer.device)

        rows = empty(max(self.list_size(lengths), 1))
        lists = LayerLists(rows, empty(layers * requests + 1), requests)
        self.step = DecodeStep(lists, empty(layers, requests))
        return self.step

    def _find_write_rows(self, forward_batch: ForwardBatch, streaming_slots: torch.Tensor) -> None:
        assert self.step is not None
        requests = self.step.lists.requests
        write_rows(
            self.step.write,
            self.state.sets.bank_of,
            self.state.sets.set_of,
            forward_batch.req_pool_indices[:requests],
            forward_batch.out_cache_loc[:requests],
            streaming_slots[:requests],
            self.state.layout,
        )

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """[requests, heads * dim]."""
        step, metadata = self.step, self.forward_metadata
        assert step is not None and isinstance(metadata, DecodeMetadata)
        arena = self.state.arena
        new_k, new_v = self.stored(k, layer.k_scale_float), self.stored(v, layer.v_scale_float)
        where = step.write[layer.layer_id, : step.lists.requests]
        store_rows(arena.keys, arena.values, where, new_k, new_v)
        wrapper = metadata.decode_wrappers[0]
        out = step.attend(
            wrapper,
            layer.layer_id,
            q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim),
            self._kv_cache,
            sm_scale=layer.scaling,
            k_scale=layer.k_scale_float,
            v_scale=layer.v_scale_float,
        )
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """[tokens, heads * dim] of the batch's new tokens."""
        prefill = self.prefill
        assert prefill is not None
        query = by_head(q, layer)
        k = k.view(-1, layer.tp_k_head_num, layer.head_dim)
        v = v.view(-1, layer.tp_v_head_num, layer.head_dim)
        new_k, new_v = self.stored(k, layer.k_scale_float), self.stored(v, layer.v_scale_float)
        if prefill.windowed:
            self._place(new_k, new_v, layer, prefill, before=True)
        if prefill.full is None:
            out, lse = self._ragged(query, k, v, layer, prefill)
        else:
            out, lse = prefill.full.run(query, self._kv_cache, layer)
        if prefill.lazy is not None:
            self._windows(out, query, layer, prefill, prefill.lazy)
        self.decider.decide(layer, query, out, lse, k, v, forward_batch)
        self._place(new_k, new_v, layer, prefill, before=not prefill.windowed, after=True)
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def stored(self, tensor: torch.Tensor, scale: float | None) -> torch.Tensor:
        """K or V as the arena holds it: [tokens, kv heads, dim] in its dtype."""
        tensor = tensor.view(len(tensor), -1, self.state.arena.keys.shape[2])
        if tensor.dtype != self.state.kv_dtype:
            if scale is not None and scale != 1.0:
                tensor = tensor / scale
            tensor = tensor.to(self.state.kv_dtype)
        return tensor.view(self.state.arena.keys.dtype)

    def _ragged(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        prefill: PrefillMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        wrapper = self.prefill_wrapper_ragged
        for lengths in prefill.lengths:
            lengths.use(layer.layer_id)
        if prefill.prefix_rows is None and not prefill.undecided:
            return wrapper.forward(query, k, v, causal=True, sm_scale=layer.scaling), None
        out, lse = wrapper.forward_return_lse(query, k, v, causal=True, sm_scale=layer.scaling)
        if prefill.prefix_rows is None:
            return out, lse
        keys, values = (part.squeeze(1) for part in self._kv_cache)
        cached = self.prefix.run(query, keys, values, prefill.prefix_rows[layer.layer_id], layer)
        merged: tuple[torch.Tensor, torch.Tensor] = stock._safe_merge_state(out, lse, *cached)
        return merged

    def _windows(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        layer: RadixAttention,
        prefill: PrefillMetadata,
        lazy: PagedCall | GatheredCall,
    ) -> None:
        """Streaming attention into ``out``, for the requests that are lazy in this layer."""
        windows: Windows = self.runner.windows()
        window, window_lse = lazy.run(query, self._kv_cache, layer)
        layout = self.state.layout
        merge_sinks(
            out,
            window_lse,
            query,
            self._kv_cache[0].squeeze(1),
            self._kv_cache[1].squeeze(1),
            prefill.sink_rows,
            prefill.lazy_tiles,
            windows,
            layer.scaling,
            layer.k_scale_float or 1.0,
            layer.v_scale_float or 1.0,
            window=window,
            banks=Banks(
                prefill.banks[:, layer.layer_id],
                layout.full_banks,
                layout.streaming_start,
                layout.streaming_rows,
            ),
        )

    def _place(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        prefill: PrefillMetadata,
        *,
        before: bool,
        after: bool = False,
    ) -> None:
        if not after or layer.layer_id < self.state.keep:
            if before:
                self._place_tiles(k, v, layer, prefill, prefill.new_tiles, before=True, scratch=not after)
            return
        # One after the other: what is cut may be read from the rows that the next request is staged in.
        self._place_tiles(k, v, layer, prefill, prefill.cut_tiles, before=before, after=True)
        self._place_tiles(k, v, layer, prefill, prefill.stage_tiles, after=True)

    def _place_tiles(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        prefill: PrefillMetadata,
        tiles: Tiles,
        *,
        before: bool = False,
        after: bool = False,
        scratch: bool = False,
    ) -> None:
        arena = self.state.arena
        place(
            arena.keys,
            arena.values,
            k,
            v,
            layer.layer_id,
            tiles,
            prefill.popped,
            self.state.sets.bank_of,
            prefill.requests,
            self.runner.windows(),
            self.state.layout,
            before=before,
            after=after,
            scratch=scratch,
        )


class DynamicDecodeUpdater(FlashInferIndicesUpdaterDecode):
    """Writes all layers' lists and, under CUDA graphs, plans; else one plan, for the longest, serves all."""

    attn_backend: DynamicFlashInferBackend

    def __init__(self, model_runner: HybridRunner, attn_backend: DynamicFlashInferBackend) -> None:
        self.runner = model_runner
        super().__init__(model_runner, attn_backend)

    def update_sliding_window(
        self,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor | None,
        seq_lens_sum: int,
        decode_wrappers: list[Any],
        encoder_lens: torch.Tensor | None,
        spec_info: Any,
        fixed_split_size: int | None = None,
        disable_split_kv: bool | None = None,
        *,
        plan: Any,
        req_pool_indices: torch.Tensor,
    ) -> None:
        """As FlashInferIndicesUpdaterDecode.update_sliding_window; no host sync under CUDA graphs."""
        wrapper, requests = decode_wrappers[0], len(seq_lens)
        if requests == 0:
            return
        lengths = seq_lens.cpu() if seq_lens_cpu is None else seq_lens_cpu[:requests]
        state, windows = self.attn_backend.state, self.runner.windows()
        step = self.attn_backend.new_step(requests, lengths, wrapper.is_cuda_graph_enabled)
        lists = step.lists
        sets = state.sets
        decode_pointers(
            lists.pointers,
            sets.bank_of,
            sets.set_of,
            req_pool_indices,
            seq_lens,
            state.layout.full_banks,
            windows,
        )
        decode_lists(
            lists.rows,
            lists.pointers,
            sets.bank_of,
            sets.set_of,
            req_pool_indices,
            seq_lens,
            int(lengths.max()),
            self.runner.streaming_tables(),
            windows,
            state.layout,
        )
        if not (wrapper.is_cuda_graph_enabled and is_replanned(wrapper)):
            self._plan_longest(wrapper, lists, lengths, fixed_split_size, disable_split_kv)
        plans = self.attn_backend.graph_plans
        if wrapper.is_cuda_graph_enabled and plans is not None:
            plan = plans.write(wrapper, lists.pointers, requests)
            self.attn_backend.step = replace(step, plan=plan, plans=plans.buffer)

    def _plan_longest(
        self,
        wrapper: Any,
        lists: LayerLists,
        lengths: torch.Tensor,
        fixed_split_size: int | None,
        disable_split_kv: bool | None,
    ) -> None:
        requests = len(lengths)
        if wrapper.is_cuda_graph_enabled:
            # A first plan copies the beginnings of lists into the wrapper's buffer: its own, not one of ours.
            wrapper._paged_kv_indptr_buf = self.kv_indptr[0][: requests + 1]
        indptr_host = host_indptr(lengths)
        plan_decode(
            self,
            wrapper,
            indptr_host,
            lists.rows[:1],
            torch.ones(requests, dtype=torch.int32),
            indptr_host,
            fixed_split_size,
            disable_split_kv,
        )
