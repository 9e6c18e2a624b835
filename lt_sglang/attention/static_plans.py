"""Plans of static mode on a GPU: a wrapper for full and one for lazy layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import (
    FlashInferIndicesUpdaterDecode,
    FlashInferIndicesUpdaterPrefill,
)

from lt_sglang.attention.flashinfer_plans import copied, host_indptr, plan_decode, plan_prefill, plan_ragged
from lt_sglang.attention.flashinfer_private import kv_indices_buffer
from lt_sglang.attention.gathered import fits
from lt_sglang.attention.indices import lazy_lengths, sink_slots, span_slots
from lt_sglang.attention.kernels.decode_static import decode_kv_indices
from lt_sglang.attention.kernels.merge_sinks import Sinks, make_sink_tiles

if TYPE_CHECKING:
    from lt_sglang.attention.runner import HybridRunner

# SGLang's wrappers, of the sliding window and of full attention.
LAZY, FULL = 0, 1

Lists = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class PrefillIndices:
    """What the layers of one prefill batch read; lists are packed, request after request.

    Of each, one a unit (attention/parts.py). window: lazy layers run the backend's ``window`` over them, or
    the paged wrapper if ``window_paged``. whole: full layers run the backend's ``whole`` over them, or the
    paged wrapper where nothing is ragged. None: ragged over the new tokens, then ``prefix`` over the cached
    ones at these lists, None if there are none.
    """

    sinks: tuple[Sinks, ...]
    window: Lists
    window_paged: bool
    whole: Lists | None
    prefix: Lists | None


class LazyDecodeUpdater(FlashInferIndicesUpdaterDecode):
    """Plans decode: the full wrapper as stock, the lazy wrapper over sinks and windows."""

    def __init__(self, model_runner: HybridRunner, attn_backend: Any) -> None:
        self.runner = model_runner
        super().__init__(model_runner, attn_backend)

    def update_sliding_window(  # noqa: PLR0913 - SGLang's signature
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
        batch = len(seq_lens)
        lengths = seq_lens.cpu() if seq_lens_cpu is None else seq_lens_cpu[:batch]
        graph = bool(wrapper.is_cuda_graph_enabled)
        backend.full_lists.fill(kv_indices_buffer(wrapper), int(lengths.sum()), graph=graph)
        backend.full_plan = None
        if backend.graph_plans is not None and wrapper.is_cuda_graph_enabled:
            requests = len(seq_lens)
            kv_indptr = self.kv_indptr[FULL][: requests + 1]
            backend.full_plan = backend.graph_plans.write(wrapper, kv_indptr, requests)
        windows = self.runner.windows()
        wrapper = decode_wrappers[LAZY]
        kv_indptr_host = host_indptr(lazy_lengths(lengths, windows))
        kv_indptr = self.kv_indptr[LAZY][: batch + 1]
        torch.cumsum(lazy_lengths(seq_lens, windows), 0, out=kv_indptr[1:])
        if wrapper.is_cuda_graph_enabled:
            kv_indices = kv_indices_buffer(wrapper)
        else:
            kv_indices = torch.empty(int(kv_indptr_host[-1]), dtype=torch.int32, device=seq_lens.device)
        tables = self.runner.streaming_tables()
        decode_kv_indices(kv_indices, kv_indptr, req_pool_indices, seq_lens, tables, windows)
        backend.lazy_lists.fill(kv_indices, int(kv_indptr_host[-1]), graph=graph)
        plan_decode(
            self,
            wrapper,
            kv_indptr=kv_indptr,
            kv_indices=kv_indices,
            last_page_len=self.kv_last_page_len[:batch],
            kv_indptr_host=kv_indptr_host,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
        )


class LazyPrefillUpdater(FlashInferIndicesUpdaterPrefill):
    """Plans prefill from host lengths alone: full layers as stock does, lazy ones over window and chunk.

    Stock SGLang plans from device tensors, and FlashInfer then waits for the chunk before this one.
    """

    def __init__(self, model_runner: HybridRunner, attn_backend: Any) -> None:
        self.runner = model_runner
        super().__init__(model_runner, attn_backend)

    def update_sliding_window(  # noqa: PLR0913 - SGLang's signature
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
        parts = backend.parts

        def full(first: torch.Tensor, end: torch.Tensor, total: int) -> Lists:
            return parts.rows(slots(first, end, total)[0], parts.full_units)

        # FA3's dense kernel for all layers, where FlashInfer has it and a copy of the tokens is small.
        fa3 = use_ragged and backend.prefix.kernels(self) == "fa3"
        whole: Lists | None = None
        prefix: Lists | None = None
        if fa3 and fits(self, sum(lengths)):
            backend.whole.plan(self, extends, lengths)
            whole = full(torch.zeros_like(seq_lens), seq_lens, sum(lengths))
        elif not use_ragged:
            whole = full(torch.zeros_like(seq_lens), seq_lens, sum(lengths))
            plan_prefill(self, prefill_wrappers[FULL], extends, lengths, whole[0], causal=True)
        else:
            plan_ragged(self, self.prefill_wrapper_ragged, extends)
            if any(prefixes):
                backend.prefix.plan(self, extends, prefixes)
                prefix = full(torch.zeros_like(prefix_lens), prefix_lens, sum(prefixes))

        windows = self.runner.windows()
        before = windows.recent_tokens - 1
        spans = [min(prefix, before) + extend for prefix, extend in zip(prefixes, extends, strict=True)]
        _, streaming = slots(prefix_lens.clamp(min=before) - before, seq_lens, sum(spans))
        window = parts.rows(streaming, parts.streaming_units)
        gathered = fa3 and fits(self, sum(spans))
        if gathered:
            backend.window.plan(self, extends, spans)
        else:
            plan_prefill(
                self, prefill_wrappers[LAZY], extends, spans, window[0], causal=True, window_left=before
            )
        tiles = make_sink_tiles(prefixes, extends, windows, req_pool_indices.device)
        sinks = Sinks(sink_slots(req_pool_indices, tables, windows), tiles, windows)
        backend.prefill = PrefillIndices(
            sinks=tuple(
                replace(sinks, slots=rows) for rows in parts.rows(sinks.slots, parts.streaming_units)
            ),
            window=window,
            window_paged=not gathered,
            whole=whole,
            prefix=prefix,
        )
