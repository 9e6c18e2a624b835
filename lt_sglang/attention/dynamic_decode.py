"""Decode of dynamic mode on a GPU: the lists that all layers of a step read, and their plans."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferIndicesUpdaterDecode

from lt_sglang.attention.decode_plan import DecodePlan, GraphPlans
from lt_sglang.attention.flashinfer_plans import LayerIndices, host_indptr, is_replanned, plan_decode
from lt_sglang.attention.flashinfer_private import planned, use_kv_indptr
from lt_sglang.attention.kernels.banks import LayerBanks
from lt_sglang.attention.kernels.decode_dynamic import decode_kv_indices, decode_kv_indptr

if TYPE_CHECKING:
    from lt_sglang.attention.runner import HybridRunner


@dataclass(frozen=True)
class DecodeStep:
    """What the layers of one decode step share.

    out_cache_loc: int32 [L, bs or more], where new K and V go. plan, plans: under CUDA graphs each layer's
    own plan, uint8 [L, bytes]; else all layers run the wrapper's, made for the longest lists.
    """

    lists: LayerIndices
    out_cache_loc: torch.Tensor
    plan: DecodePlan | None = None
    plans: torch.Tensor | None = None

    def attend(
        self, wrapper: Any, layer: int, query: torch.Tensor, cache: Any, **options: Any
    ) -> torch.Tensor:
        """[requests, heads, dim] of one layer; ``cache``: paged."""
        self.lists.use(wrapper, layer)
        how: AbstractContextManager[None] = nullcontext()
        if self.plan is not None and self.plans is not None:
            how = planned(wrapper, self.plan.info, self.plans[layer])
        with how:
            out: torch.Tensor = wrapper.forward(query, cache, **options)
        return out


@dataclass(frozen=True)
class GraphBuffers:
    """What CUDA graphs of up to ``max_bs`` requests read; ``kv_indices`` of all layers in one buffer.

    padding: elements of requests that only fill a graph's batch up, one a layer each.
    """

    kv_indices: torch.Tensor
    kv_indptr: torch.Tensor
    out_cache_loc: torch.Tensor
    plans: GraphPlans
    padding: int


class DecodeSteps:
    """Makes the steps' buffers: those of the CUDA graphs, or new ones.

    Attributes:
        current: the step that runs.
        graphs: None where there are no CUDA graphs.
    """

    def __init__(self, banks: LayerBanks, device: torch.device) -> None:
        self._banks = banks
        self._device = device
        self.current: DecodeStep | None = None
        self.graphs: GraphBuffers | None = None

    def init_graphs(self, backend: Any, max_bs: int, max_context: int) -> None:
        """Allocate the buffers of CUDA graphs; ``backend``: SGLang's, for its workspace and heads."""
        layout, lazy_tokens = self._banks.layout, self._banks.windows.lazy_tokens
        full = min(max_bs * max_context, 2 * (layout.rows // layout.shape.full_units))
        padding = layout.layers * max_bs
        size = layout.full_banks * full + layout.streaming_banks * max_bs * lazy_tokens

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self._device)

        self.graphs = GraphBuffers(
            kv_indices=zeros(size + padding),
            kv_indptr=zeros(layout.layers * max_bs + 1),
            out_cache_loc=zeros(layout.layers, max_bs),
            plans=GraphPlans(backend, backend.indices_updater_decode, layout.layers, max_bs),
            padding=padding,
        )

    def fits_graph(self, lengths: torch.Tensor | None) -> bool:
        """Whether lists of requests of ``lengths`` (host) fit the graphs' buffer; they may share tokens."""
        if self.graphs is None or lengths is None:
            return True
        return self.list_size(lengths) + self.graphs.padding <= len(self.graphs.kv_indices)

    def list_size(self, lengths: torch.Tensor) -> int:
        """Elements of all layers' lists for requests of ``lengths`` (host tensor)."""
        layout = self._banks.layout
        short = int(lengths.clamp(max=self._banks.windows.lazy_tokens).sum())
        return layout.full_banks * int(lengths.sum()) + layout.streaming_banks * short

    def begin(self, lengths: torch.Tensor, graph: bool) -> DecodeStep:
        """A step of requests of ``lengths`` (host) that runs as a graph or not."""
        layers, requests = self._banks.layout.layers, len(lengths)
        if graph:
            assert self.graphs is not None
            kv_indptr = self.graphs.kv_indptr[: layers * requests + 1]
            lists = LayerIndices(self.graphs.kv_indices, kv_indptr, requests)
            self.current = DecodeStep(lists, self.graphs.out_cache_loc)
            return self.current

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=self._device)

        kv_indices = empty(max(self.list_size(lengths), 1))
        lists = LayerIndices(kv_indices, empty(layers * requests + 1), requests)
        self.current = DecodeStep(lists, empty(layers, requests))
        return self.current


class DynamicDecodeUpdater(FlashInferIndicesUpdaterDecode):
    """Writes all layers' lists and, under CUDA graphs, plans; else one plan, for the longest, serves all."""

    def __init__(
        self, model_runner: HybridRunner, attn_backend: Any, banks: LayerBanks, steps: DecodeSteps
    ) -> None:
        self.runner = model_runner
        self.banks = banks
        self.steps = steps
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
        wrapper, requests = decode_wrappers[0], len(seq_lens)
        if requests == 0:
            return
        lengths = seq_lens.cpu() if seq_lens_cpu is None else seq_lens_cpu[:requests]
        step = self.steps.begin(lengths, wrapper.is_cuda_graph_enabled)
        lists = step.lists
        decode_kv_indptr(lists.kv_indptr, self.banks, req_pool_indices, seq_lens)
        decode_kv_indices(
            lists.kv_indices,
            lists.kv_indptr,
            self.banks,
            self.runner.streaming_tables(),
            req_pool_indices=req_pool_indices,
            seq_lens=seq_lens,
            longest=int(lengths.max()),
        )
        if not (wrapper.is_cuda_graph_enabled and is_replanned(wrapper)):
            self._plan_longest(wrapper, lists, lengths, fixed_split_size, disable_split_kv)
        if wrapper.is_cuda_graph_enabled and self.steps.graphs is not None:
            plans = self.steps.graphs.plans
            own = plans.write(wrapper, lists.kv_indptr, requests)
            self.steps.current = replace(step, plan=own, plans=plans.buffer)

    def _plan_longest(
        self,
        wrapper: Any,
        lists: LayerIndices,
        lengths: torch.Tensor,
        fixed_split_size: int | None,
        disable_split_kv: bool | None,
    ) -> None:
        requests = len(lengths)
        if wrapper.is_cuda_graph_enabled:
            # A first plan copies the beginnings of lists into the wrapper's buffer: its own, not one of ours.
            use_kv_indptr(wrapper, self.kv_indptr[0][: requests + 1])
        kv_indptr_host = host_indptr(lengths)
        plan_decode(
            self,
            wrapper,
            kv_indptr=kv_indptr_host,
            kv_indices=lists.kv_indices[:1],
            last_page_len=torch.ones(requests, dtype=torch.int32),
            kv_indptr_host=kv_indptr_host,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
        )
