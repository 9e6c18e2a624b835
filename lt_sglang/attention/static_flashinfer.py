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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention import flashinfer_backend as stock
from sglang.srt.layers.attention.flashinfer_backend import (
    FlashInferAttnBackend,
    FlashInferIndicesUpdaterDecode,
    FlashInferIndicesUpdaterPrefill,
    WrapperDispatch,
)
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from lt_sglang.attention.decode_plan import DecodePlan, GraphPlans, planned
from lt_sglang.attention.flashinfer_plans import (
    by_head,
    copied,
    host_indptr,
    plan_decode,
    plan_prefill,
    plan_ragged,
)
from lt_sglang.attention.gathered import GatheredAttention, fits
from lt_sglang.attention.indices import Windows, lazy_lengths, sink_rows, span_slots
from lt_sglang.attention.kernels.decode_static import decode_rows
from lt_sglang.attention.kernels.merge_sinks import SinkTiles, make_sink_tiles, merge_sinks
from lt_sglang.attention.prefix import PrefixAttention
from lt_sglang.errors import LightTransferError

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from lt_sglang.attention.runner import HybridRunner

LAZY, FULL = 0, 1


@dataclass(frozen=True)
class PrefillLists:
    """What the layers of one prefill batch share.

    sink_rows: int64 [requests, w_sink]. The others are packed, request after request:
    window_rows: lazy layers run the backend's ``window`` over them; None: the paged wrapper.
    whole_rows: full layers run the backend's ``whole`` over them. None: ragged over the new tokens, then
    ``prefix`` over the cached ones at ``prefix_rows``, None if there are none.
    """

    sink_rows: torch.Tensor
    tiles: SinkTiles
    windows: Windows
    window_rows: torch.Tensor | None
    whole_rows: torch.Tensor | None
    prefix_rows: torch.Tensor | None


class LightTransferFlashInferBackend(FlashInferAttnBackend):
    """FlashInferAttnBackend with lazy layers; with none it is FlashInferAttnBackend."""

    def __init__(self, model_runner: HybridRunner) -> None:
        super().__init__(model_runner, init_new_workspace=model_runner.init_new_workspace)
        self.lazy_layers = frozenset(model_runner.lt_config.lazy_layers)
        self.prefill: PrefillLists | None = None
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
        if self.lazy_layers and layer.layer_id not in self.lazy_layers and self.full_plan is not None:
            assert self.graph_plans is not None and isinstance(self.forward_metadata, stock.DecodeMetadata)
            wrapper = self.forward_metadata.decode_wrappers[FULL]
            how = planned(wrapper, self.full_plan, self.graph_plans.buffer[0])
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
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        given = self.prefill
        assert given is not None
        if save_kv_cache and k is not None:
            self._store(k, v, layer, forward_batch)
        keys, values = cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        query = by_head(q, layer)
        if given.window_rows is not None:
            new = None if k is None else self._new(k, v, layer)
            out, lse = self.window.run(query, new, cache, given.window_rows, layer)
        else:
            out, lse = self.forward_metadata.prefill_wrappers[LAZY].forward_return_lse(
                query,
                cache,
                causal=True,
                sm_scale=layer.scaling,
                window_left=given.windows.recent_tokens - 1,
                k_scale=layer.k_scale_float,
                v_scale=layer.v_scale_float,
            )
        merge_sinks(
            out,
            lse,
            query,
            keys,
            values,
            given.sink_rows,
            given.tiles,
            given.windows,
            layer.scaling,
            layer.k_scale_float or 1.0,
            layer.v_scale_float or 1.0,
        )
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
        given = self.prefill
        assert given is not None
        # What is gathered has to be written before. Else K and V are read first: an fp8 pool divides them by
        # its scales in place.
        gathered = given.whole_rows is not None
        if save_kv_cache and gathered:
            self._store(k, v, layer, forward_batch)
        query, new = by_head(q, layer), self._new(k, v, layer)
        cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        scales = {"sm_scale": layer.scaling, "logits_soft_cap": layer.logit_cap}
        wrapper = self.prefill_wrapper_ragged
        if given.whole_rows is not None:
            out, _ = self.whole.run(query, new, cache, given.whole_rows, layer)
        elif given.prefix_rows is None:
            out = wrapper.forward(query, *new, causal=True, **scales)
        else:
            among = wrapper.forward_return_lse(query, *new, causal=True, **scales)
            keys, values = cache
            cached = self.prefix.run(query, keys, values, given.prefix_rows, layer)
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
    def _new(k: torch.Tensor, v: torch.Tensor, layer: RadixAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, KV heads, dim] each."""
        return (
            k.view(-1, layer.tp_k_head_num, layer.head_dim),
            v.view(-1, layer.tp_v_head_num, layer.head_dim),
        )


class LazyDecodeUpdater(FlashInferIndicesUpdaterDecode):
    """Plans decode: the full wrapper as stock, the lazy wrapper over sinks and windows."""

    def __init__(self, model_runner: HybridRunner, attn_backend: LightTransferFlashInferBackend) -> None:
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
        backend, wrapper = self.attn_backend, decode_wrappers[FULL]
        with copied(wrapper):
            self.call_begin_forward(
                wrapper,
                seq_lens,
                seq_lens_sum,
                self.kv_indptr[FULL],
                None,
                spec_info,
                seq_lens_cpu=seq_lens_cpu,
                fixed_split_size=fixed_split_size,
                disable_split_kv=disable_split_kv,
                plan=plan,
                req_pool_indices=req_pool_indices,
            )
        backend.full_plan = None
        if backend.graph_plans is not None and wrapper.is_cuda_graph_enabled:
            requests = len(seq_lens)
            pointers = self.kv_indptr[FULL][: requests + 1]
            backend.full_plan = backend.graph_plans.write(wrapper, pointers, requests)
        windows = self.runner.windows()
        wrapper = decode_wrappers[LAZY]
        batch = len(seq_lens)
        lengths_host = lazy_lengths(seq_lens.cpu() if seq_lens_cpu is None else seq_lens_cpu[:batch], windows)
        indptr_host = host_indptr(lengths_host)
        indptr = self.kv_indptr[LAZY][: batch + 1]
        torch.cumsum(lazy_lengths(seq_lens, windows), 0, out=indptr[1:])
        if wrapper.is_cuda_graph_enabled:
            rows = wrapper._paged_kv_indices_buf
        else:
            rows = torch.empty(int(indptr_host[-1]), dtype=torch.int32, device=seq_lens.device)
        decode_rows(rows, indptr, req_pool_indices, seq_lens, self.runner.streaming_tables(), windows)
        plan_decode(
            self,
            wrapper,
            indptr,
            rows,
            self.kv_last_page_len[:batch],
            indptr_host,
            fixed_split_size,
            disable_split_kv,
        )


class LazyPrefillUpdater(FlashInferIndicesUpdaterPrefill):
    """Plans prefill from host lengths alone: full layers as stock does, lazy ones over window and chunk.

    Stock SGLang plans from device tensors, and FlashInfer then waits for the chunk before this one.
    """

    def __init__(self, model_runner: HybridRunner, attn_backend: LightTransferFlashInferBackend) -> None:
        self.runner = model_runner
        super().__init__(model_runner, attn_backend)

    def update_sliding_window(
        self,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor | None,
        seq_lens_sum: int,
        prefix_lens: torch.Tensor | None,
        prefill_wrappers: list[Any],
        use_ragged: bool,
        encoder_lens: torch.Tensor | None,
        spec_info: Any,
        fixed_split_size: int | None = None,
        multi_item_params: Any = None,
        cross_attention_custom_mask: torch.Tensor | None = None,
        extend_prefix_lens_cpu: list[int] | None = None,
        custom_kv_indices: torch.Tensor | None = None,
        *,
        plan: Any,
    ) -> None:
        """As FlashInferIndicesUpdaterPrefill.update_sliding_window; lazy layers are always paged."""
        assert spec_info is None and prefix_lens is not None and seq_lens_cpu is not None
        prefixes = prefix_lens.tolist() if extend_prefix_lens_cpu is None else list(extend_prefix_lens_cpu)
        lengths = seq_lens_cpu[: len(prefixes)].tolist()
        extends = [length - prefix for length, prefix in zip(lengths, prefixes, strict=True)]
        tables = self.runner.streaming_tables()

        def slots(first: torch.Tensor, end: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
            first, end = first.to(torch.int64), end.to(torch.int64)
            return span_slots(req_pool_indices, first, end - first, total, tables)

        backend = self.attn_backend
        # FA3's dense kernel for all layers, where FlashInfer has it and a copy of the tokens is small.
        fa3 = use_ragged and backend.prefix.kernels(self) == "fa3"
        whole_rows = prefix_rows = window_rows = None
        if fa3 and fits(self, sum(lengths)):
            backend.whole.plan(self, extends, lengths)
            whole_rows, _ = slots(torch.zeros_like(seq_lens), seq_lens, sum(lengths))
        elif not use_ragged:
            rows, _ = slots(torch.zeros_like(seq_lens), seq_lens, sum(lengths))
            plan_prefill(self, prefill_wrappers[FULL], extends, lengths, rows, causal=True)
        else:
            plan_ragged(self, self.prefill_wrapper_ragged, extends)
            if any(prefixes):
                backend.prefix.plan(self, extends, prefixes)
                prefix_rows, _ = slots(torch.zeros_like(prefix_lens), prefix_lens, sum(prefixes))

        windows = self.runner.windows()
        before = windows.recent_tokens - 1
        spans = [min(prefix, before) + extend for prefix, extend in zip(prefixes, extends, strict=True)]
        _, rows = slots(prefix_lens.clamp(min=before) - before, seq_lens, sum(spans))
        if fa3 and fits(self, sum(spans)):
            backend.window.plan(self, extends, spans)
            window_rows = rows
        else:
            plan_prefill(self, prefill_wrappers[LAZY], extends, spans, rows, causal=True, window_left=before)
        backend.prefill = PrefillLists(
            sink_rows=sink_rows(req_pool_indices, tables, windows),
            tiles=make_sink_tiles(prefixes, extends, windows, req_pool_indices.device),
            windows=windows,
            window_rows=window_rows,
            whole_rows=whole_rows,
            prefix_rows=prefix_rows,
        )
