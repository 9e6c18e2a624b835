"""The GPU backend: FlashInfer for every layer, one plan for full and one for lazy layers a step.

Decode of a lazy layer is one paged call over [sink rows] + [window slots]; a Triton kernel writes that
list once a step for all lazy layers. Prefill of a lazy layer is a windowed call over the window before the
chunk and the chunk itself, then a Triton kernel adds the sinks each query sees beyond it. Only FlashInfer's
FA2 kernels and Triton are needed (sm80 and newer); prefill uses FA3 where FlashInfer has it
(attention/gathered.py).

Source: sglang/srt/layers/attention/flashinfer_backend.py (wrapper 0: sliding window, wrapper 1: full).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention import flashinfer_backend as stock
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend, WrapperDispatch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from lt_sglang.attention.decode_plan import DecodePlan, GraphPlans
from lt_sglang.attention.flashinfer_plans import by_head
from lt_sglang.attention.flashinfer_private import planned, use_kv_indices
from lt_sglang.attention.gathered import GatheredAttention
from lt_sglang.attention.kernels.merge_sinks import Scales, merge_sinks
from lt_sglang.attention.parts import DecodeLists, LayerParts
from lt_sglang.attention.prefix import PrefixAttention
from lt_sglang.attention.static_plans import FULL, LAZY, LazyDecodeUpdater, LazyPrefillUpdater, PrefillIndices
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.kv import KV

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from lt_sglang.attention.runner import HybridRunner


class LightTransferFlashInferBackend(FlashInferAttnBackend):
    """FlashInferAttnBackend with lazy layers; with none it is FlashInferAttnBackend."""

    def __init__(self, model_runner: HybridRunner) -> None:
        super().__init__(model_runner, init_new_workspace=model_runner.init_new_workspace)
        self.lazy_layers = frozenset(model_runner.lt_config.lazy_layers)
        self.prefill: PrefillIndices | None = None
        if not self.lazy_layers:
            return
        if self.dispatch_reason != WrapperDispatch.SLIDING_WINDOW or not self.use_sliding_window_kv_pool:
            raise LightTransferError(
                "attention backend: SGLang did not set up the streaming pool for FlashInfer"
            )
        if self.is_dllm_model or self.enable_mis:
            raise LightTransferError("--enable-mis: multi-item scoring is not supported with lazy layers")
        self.lazy_tokens = model_runner.lt_config.lazy_tokens
        self.prefix = PrefixAttention(self.workspace_buffer)
        self.whole = GatheredAttention(self.workspace_buffer)
        recent_tokens = model_runner.lt_config.recent_tokens
        self.window = GatheredAttention(self.workspace_buffer, window_left=recent_tokens - 1)
        self.parts = LayerParts(model_runner.flat_pool, model_runner.lt_config.lazy_layers)
        self.full_lists = DecodeLists(self.parts, self.parts.full_units)
        self.lazy_lists = DecodeLists(self.parts, self.parts.streaming_units)
        self.graph_plans: GraphPlans | None = None
        self.full_plan: DecodePlan | None = None
        self.indices_updater_decode = LazyDecodeUpdater(model_runner, self)
        self.indices_updater_prefill = LazyPrefillUpdater(model_runner, self)

    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None
    ) -> None:
        """As FlashInferAttnBackend; the lazy layers' index buffer is as small as their windows."""
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf)
        if self.lazy_layers:
            size = max_num_tokens * self.lazy_tokens
            self.cuda_graph_kv_indices[LAZY] = torch.zeros(size, dtype=torch.int32, device="cuda")
            self.full_lists.init_graphs(self.cuda_graph_kv_indices[FULL])
            self.lazy_lists.init_graphs(self.cuda_graph_kv_indices[LAZY])
            # The CUDA-core kernel, for few query heads a KV head, has plans of another form.
            if self.decode_use_tensor_cores:
                self.graph_plans = GraphPlans(self, self.indices_updater_decode, 1, max_bs)

    def _get_wrapper_idx(self, layer: RadixAttention) -> int:
        if not self.lazy_layers:
            return int(super()._get_wrapper_idx(layer))
        return LAZY if layer.layer_id in self.lazy_layers else FULL

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
        how: AbstractContextManager[None] = nullcontext()
        if self.lazy_layers:
            assert isinstance(self.forward_metadata, stock.DecodeMetadata)
            lazy = layer.layer_id in self.lazy_layers
            wrapper = self.forward_metadata.decode_wrappers[LAZY if lazy else FULL]
            (self.lazy_lists if lazy else self.full_lists).use(wrapper, layer.layer_id)
            if not lazy and self.full_plan is not None:
                assert self.graph_plans is not None
                how = planned(wrapper, self.full_plan.info, self.graph_plans.buffer[0])
        with how:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)

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
        if layer.layer_id not in self.lazy_layers:
            if self.lazy_layers and self.forward_metadata.use_ragged and k is not None:
                return self._full(q, k, v, layer, forward_batch, save_kv_cache)
            if self.lazy_layers and self.prefill is not None and self.prefill.whole is not None:
                wrapper = self.forward_metadata.prefill_wrappers[FULL]
                use_kv_indices(wrapper, self.prefill.whole[self.parts.of(layer.layer_id)])
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        given, part = self.prefill, self.parts.of(layer.layer_id)
        assert given is not None
        if save_kv_cache and k is not None:
            self._store(k, v, layer, forward_batch)
        cache = KV(*self.token_to_kv_pool.get_kv_buffer(layer.layer_id))
        query = by_head(q, layer)
        sinks = given.sinks[part]
        if not given.window_paged:
            new = None if k is None else self._new(k, v, layer)
            out, lse = self.window.run(query, new, cache, given.window[part], layer)
        else:
            wrapper = self.forward_metadata.prefill_wrappers[LAZY]
            use_kv_indices(wrapper, given.window[part])
            out, lse = wrapper.forward_return_lse(
                query,
                cache,
                causal=True,
                sm_scale=layer.scaling,
                window_left=sinks.windows.recent_tokens - 1,
                k_scale=layer.k_scale_float,
                v_scale=layer.v_scale_float,
            )
        merge_sinks(out, lse, query, cache, sinks, Scales.of(layer))
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def _full(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        """A full layer: all tokens at once, or new ones among themselves, then over the cached ones."""
        given, part = self.prefill, self.parts.of(layer.layer_id)
        assert given is not None
        # What is gathered has to be written before. Else K and V are read first: an fp8 pool divides them by
        # its scales in place.
        gathered = given.whole is not None
        if save_kv_cache and gathered:
            self._store(k, v, layer, forward_batch)
        query, new = by_head(q, layer), self._new(k, v, layer)
        cache = KV(*self.token_to_kv_pool.get_kv_buffer(layer.layer_id))
        scales = {"sm_scale": layer.scaling, "logits_soft_cap": layer.logit_cap}
        wrapper = self.prefill_wrapper_ragged
        if given.whole is not None:
            out, _ = self.whole.run(query, new, cache, given.whole[part], layer)
        elif given.prefix is None:
            out = wrapper.forward(query, *new, causal=True, **scales)
        else:
            among = wrapper.forward_return_lse(query, *new, causal=True, **scales)
            cached = self.prefix.run(query, cache, given.prefix[part], layer)
            out, _ = stock._safe_merge_state(*among, *cached)
        if save_kv_cache and not gathered:
            self._store(k, v, layer, forward_batch)
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def _store(
        self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> None:
        where = KVWriteLoc.for_layer(forward_batch, layer, swa_loc=self.forward_metadata.swa_out_cache_loc)
        self.token_to_kv_pool.set_kv_buffer(layer, where, k, v, *self._kv_write_scales(layer))

    @staticmethod
    def _new(k: torch.Tensor, v: torch.Tensor, layer: RadixAttention) -> KV:
        return KV(
            k.view(-1, layer.tp_k_head_num, layer.head_dim), v.view(-1, layer.tp_v_head_num, layer.head_dim)
        )
