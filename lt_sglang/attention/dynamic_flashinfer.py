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

from typing import TYPE_CHECKING, Any

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper
from sglang.srt.layers.attention import flashinfer_backend as stock
from sglang.srt.layers.attention.flashinfer_backend import DecodeMetadata, FlashInferAttnBackend

from lt_sglang.attention.dynamic_decode import DecodeSteps, DynamicDecodeUpdater
from lt_sglang.attention.dynamic_prefill import PrefillCalls, PrefillMetadata, PrefillPlanner
from lt_sglang.attention.flashinfer_plans import by_head, paged
from lt_sglang.attention.gathered import GatheredAttention
from lt_sglang.attention.kernels.banks import LayerBanks
from lt_sglang.attention.kernels.decode_dynamic import decode_out_cache_loc
from lt_sglang.attention.kernels.merge_sinks import BankColumn, Scales, merge_sinks
from lt_sglang.attention.kernels.place import exchange, store_new
from lt_sglang.attention.kernels.store import store_kv
from lt_sglang.attention.prefix import PrefixAttention
from lt_sglang.errors import LightTransferError
from lt_sglang.identify.selector import LayerSelector
from lt_sglang.memory.kv import KV

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from lt_sglang.attention.runner import HybridRunner


class DynamicFlashInferBackend(FlashInferAttnBackend):
    """FlashInferAttnBackend in which every request has lazy layers of its own."""

    def __init__(self, model_runner: HybridRunner) -> None:
        super().__init__(model_runner, init_new_workspace=model_runner.init_new_workspace)
        if not self.use_sliding_window_kv_pool or self.is_dllm_model or self.is_multimodal:
            raise LightTransferError(
                "attention backend: dynamic mode serves text models with hybrid KV pools"
            )
        assert model_runner.dynamic is not None
        # Only the tensor-core kernel may be planned longer than its lists are.
        self.decode_use_tensor_cores = True
        self.decode_wrappers = [
            BatchDecodeWithPagedKVCacheWrapper(
                self.workspace_buffer, "NHD", backend=self.decode_backend, use_tensor_cores=True
            )
        ]
        recent_tokens = model_runner.lt_config.recent_tokens
        self.calls = PrefillCalls(
            updater=self.indices_updater_prefill,
            ragged=self.prefill_wrapper_ragged,
            paged=self.prefill_wrappers_paged,
            prefix=PrefixAttention(self.workspace_buffer),
            whole=GatheredAttention(self.workspace_buffer),
            window=GatheredAttention(self.workspace_buffer, window_left=recent_tokens - 1),
        )
        self._set_up(model_runner)
        self.indices_updater_decode = DynamicDecodeUpdater(model_runner, self, self.banks, self.steps)

    def _set_up(self, runner: HybridRunner) -> None:
        """Set up what is ours, once ``calls`` and SGLang's part stand."""
        state = runner.dynamic
        assert state is not None
        self.runner, self.state = runner, state
        self.banks = LayerBanks(
            state.sets.bank_of, state.sets.set_of, state.layout, state.pool.units.rest, runner.windows()
        )
        self.steps = DecodeSteps(self.banks, self.workspace_buffer.device)
        self.prefill_planner = PrefillPlanner(state, self.banks, self.calls)
        self.prefill: PrefillMetadata | None = None
        self.selector = LayerSelector(state)
        self.pool = state.pool.kv
        self.cache = KV(self.pool.k.view(state.kv_dtype), self.pool.v.view(state.kv_dtype))
        self.paged_cache = paged(self.cache)

    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None
    ) -> None:
        """As FlashInferAttnBackend, with one buffer for the lists of all layers."""
        super().init_cuda_graph_state(
            max_bs, max_num_tokens, torch.zeros(1, dtype=torch.int32, device="cuda")
        )
        self.steps.init_graphs(self, max_bs, self.max_context_len)

    def fits_graph(self, forward_batch: ForwardBatch) -> bool:
        """Whether the lists of a decode batch fit the CUDA graphs' buffer (requests may share tokens)."""
        return self.steps.fits_graph(forward_batch.seq_lens_cpu)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan a step that runs without a CUDA graph."""
        if forward_batch.forward_mode.is_decode_or_idle():
            super().init_forward_metadata(forward_batch)
            if self.steps.current is not None and len(forward_batch.req_pool_indices):
                assert self.forward_metadata.swa_out_cache_loc is not None
                self._find_out_cache_loc(forward_batch, self.forward_metadata.swa_out_cache_loc)
            return
        plans = self.runner.prefill_plans.of(forward_batch)
        self.prefill = self.prefill_planner.plan(
            plans, forward_batch.req_pool_indices, self.runner.streaming_tables()
        )
        given = self.prefill.requests
        self.selector.begin(plans, self.prefill.popped, given.full, given.streaming)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """As FlashInferAttnBackend; where K and V go follows once the streaming slots are known."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self._find_out_cache_loc(forward_batch, self.cuda_graph_swa_out_cache_loc)

    def _create_decode_wrappers(self, bs: int, num_tokens: int) -> list[Any]:
        assert self.steps.graphs is not None
        return [
            BatchDecodeWithPagedKVCacheWrapper(
                self.workspace_buffer,
                "NHD",
                backend=self.decode_backend,
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=self.kv_indptr[0][: num_tokens + 1],
                paged_kv_indices_buffer=self.steps.graphs.kv_indices,
                paged_kv_last_page_len_buffer=self.kv_last_page_len[:num_tokens],
            )
        ]

    def _find_out_cache_loc(self, forward_batch: ForwardBatch, streaming_slots: torch.Tensor) -> None:
        step = self.steps.current
        assert step is not None
        requests = step.lists.requests
        # Of a graph's batch SGLang pads the requests, but not their out_cache_loc.
        decode_out_cache_loc(
            step.out_cache_loc,
            self.banks,
            req_pool_indices=forward_batch.req_pool_indices[:requests],
            full_slots=forward_batch.out_cache_loc[:requests],
            streaming_slots=streaming_slots[:requests],
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
        step, metadata = self.steps.current, self.forward_metadata
        assert step is not None and isinstance(metadata, DecodeMetadata)
        out_cache_loc = step.out_cache_loc[layer.layer_id, : step.lists.requests]
        store_kv(self.pool, out_cache_loc, self._stored(k, v, layer))
        out = step.attend(
            metadata.decode_wrappers[0],
            layer.layer_id,
            q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim),
            self.paged_cache,
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
        new = KV(
            k.view(-1, layer.tp_k_head_num, layer.head_dim), v.view(-1, layer.tp_v_head_num, layer.head_dim)
        )
        stored = self._stored(k, v, layer)
        if prefill.windowed:  # cached and new tokens are then read from one list
            self._store_new(stored, layer, prefill)
        if prefill.full is None:
            out, lse = self._ragged(query, new, layer, prefill)
        else:
            out, lse = prefill.full.run(query, self.cache, layer)
        if prefill.lazy is not None:
            window, window_lse = prefill.lazy.run(query, self.cache, layer)
            column = BankColumn.of_layer(self.banks, prefill.banks[:, layer.layer_id])
            merge_sinks(
                out,
                window_lse,
                query,
                self.cache,
                prefill.sinks,
                Scales.of(layer),
                window=window,
                banks=(column, self.state.layout.shape),
            )
        if not prefill.windowed:
            self._store_new(stored, layer, prefill)
        self.selector.select(layer, query, out, lse, new, forward_batch)
        if layer.layer_id >= self.state.keep:
            exchange(
                self.pool,
                layer.layer_id,
                prefill.select_tiles,
                prefill.requests,
                self.banks,
                prefill.popped,
            )
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def _store_new(self, stored: KV, layer: RadixAttention, prefill: PrefillMetadata) -> None:
        store_new(self.pool, stored, layer.layer_id, prefill.new_tiles, prefill.requests, self.banks)

    def _stored(self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention) -> KV:
        """New K and V as the pool holds them: [tokens, KV heads, dim] in its dtype."""
        return KV(self._as_stored(k, layer.k_scale_float), self._as_stored(v, layer.v_scale_float))

    def _as_stored(self, tensor: torch.Tensor, scale: float | None) -> torch.Tensor:
        tensor = tensor.view(len(tensor), -1, self.pool.k.shape[2])
        if tensor.dtype != self.state.kv_dtype:
            if scale is not None and scale != 1.0:
                tensor = tensor / scale
            tensor = tensor.to(self.state.kv_dtype)
        return tensor.view(self.pool.k.dtype)

    def _ragged(
        self, query: torch.Tensor, new: KV, layer: RadixAttention, prefill: PrefillMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        wrapper = self.calls.ragged
        for lengths in prefill.lengths:
            lengths.use(layer.layer_id)
        if prefill.prefix_kv_indices is None and not prefill.undecided:
            return wrapper.forward(query, *new, causal=True, sm_scale=layer.scaling), None
        out, lse = wrapper.forward_return_lse(query, *new, causal=True, sm_scale=layer.scaling)
        if prefill.prefix_kv_indices is None:
            return out, lse
        cached = self.calls.prefix.run(query, self.cache, prefill.prefix_kv_indices[layer.layer_id], layer)
        merged: tuple[torch.Tensor, torch.Tensor] = stock._safe_merge_state(out, lse, *cached)
        return merged
