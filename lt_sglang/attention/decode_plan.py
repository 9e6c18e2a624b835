"""Decode plans for FlashInfer, made on the device: how lists are cut into chunks that together fill the GPU.

FlashInfer's own plan is made on the host, of at most as many chunks as the GPU runs at a time. That has two
faults here. In dynamic mode only the device knows how long a layer's lists are, and a plan for the longest
they could be leaves the GPU idle where they are short. And where requests are no multiple of what the GPU
runs at a time, or some lists are long and others short, the last chunks run alone. So one kernel writes plans
for the lists at hand, of smaller chunks, several for each place on the GPU. CUDA graphs run those.

Source: flashinfer/data/include/flashinfer/attention/scheduler.cuh, PrefillSplitQOKVIndptr and PrefillPlanImpl
(tensor-core decode is a prefill of one query a request).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lt_sglang.attention.flashinfer_private import PrefillPlanInfo, plan_info
from lt_sglang.attention.kernels.decode_plans import PlanOffsets, write_plans
from lt_sglang.errors import LightTransferError

# Chunks that may be planned for each place on the GPU (each multiprocessor has two), beside one a request.
CHUNKS_PER_PLACE = 3
# Lists of one length run in whole rounds. Long ones may be cut until there are ROUNDS, so that a last one
# with gaps is a small part, but none into more than CUTS. Lists that differ fill gaps by themselves, and
# more chunks of them, or of windows, only take longer to start.
ROUNDS, CUTS = 16, 4
ALIGN = 16


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _places(kv_heads: int, processors: int) -> int:
    return max(2 * processors // kv_heads, 1)


def _most_chunks(requests: int, places: int) -> tuple[int, int]:
    """Of long lists of one length, and of others; the first is not below the second."""
    others = CHUNKS_PER_PLACE * places + requests
    return max(others, min(ROUNDS * places, CUTS * requests)), others


@dataclass(frozen=True)
class DecodePlan:
    """Where a plan of ``requests`` queries and at most ``chunks`` chunks lies in FlashInfer's workspaces.

    tile: queries times heads that one chunk takes (cta_tile_q). places: chunks of one KV head that the GPU
    runs at a time. partial_bytes: of the chunks' outputs before they are merged; their sums follow.
    uneven_chunks: as ``chunks``, of lists that are short or not of one length.
    """

    requests: int
    chunks: int
    tile: int
    places: int
    partial_bytes: int
    uneven_chunks: int

    @classmethod
    def like(
        cls, info: PrefillPlanInfo, requests: int, heads: int, kv_heads: int, dim: int, processors: int
    ) -> DecodePlan:
        """For a wrapper that FlashInfer planned under CUDA graphs; ``processors``: the GPU's multiprocessors.

        Raises:
            LightTransferError: its plan is not of the form that the kernel knows.
        """
        known = info.enable_cuda_graph and info.split_kv and info.cta_tile_q >= heads // kv_heads
        if not known or info.total_num_rows != requests:
            raise LightTransferError(
                f"FlashInfer's decode plan {list(info)} of {requests} requests, {heads} query and {kv_heads} "
                "KV heads is not of the known form; use flashinfer-python 0.7.2"
            )
        places = _places(kv_heads, processors)
        chunks, uneven = _most_chunks(requests, places)
        return cls(requests, chunks, info.cta_tile_q, places, _aligned(heads * chunks * dim * 4), uneven)

    @cached_property
    def at(self) -> PlanOffsets:
        """Where its arrays begin."""
        items, indptr = _aligned(4 * self.chunks), _aligned(4 * (self.requests + 1))
        o_indptr = 3 * items
        chunk_size = o_indptr + 2 * indptr
        return PlanOffsets(
            query_tiles=items,
            kv_tiles=2 * items,
            o_indptr=o_indptr,
            merge_indptr=o_indptr + indptr,
            chunk_size=chunk_size,
            total_rows=chunk_size + ALIGN,
            valid=chunk_size + 2 * ALIGN,
        )

    @property
    def end(self) -> int:
        """Bytes of one plan."""
        return _aligned(self.at.valid + self.chunks)

    @property
    def info(self) -> PrefillPlanInfo:
        """The same for FlashInfer: under CUDA graphs, lists are split."""
        return PrefillPlanInfo(
            padded_batch_size=self.chunks,
            total_num_rows=self.requests,
            total_num_rows_offset=self.at.total_rows,
            cta_tile_q=self.tile,
            request_indices_offset=0,
            qo_tile_indices_offset=self.at.query_tiles,
            kv_tile_indices_offset=self.at.kv_tiles,
            merge_indptr_offset=self.at.merge_indptr,
            o_indptr_offset=self.at.o_indptr,
            kv_chunk_size_ptr_offset=self.at.chunk_size,
            v_offset=0,
            s_offset=self.partial_bytes,
            block_valid_mask_offset=self.at.valid,
            enable_cuda_graph=1,
            split_kv=1,
        )


def plan_bytes(requests: int, kv_heads: int, processors: int) -> int:
    """Bytes of the largest plan of up to ``requests`` requests; a multiple of 256."""
    places = _places(kv_heads, processors)
    # More requests have as many chunks, or more.
    end = DecodePlan(requests, _most_chunks(requests, places)[0], 0, places, 0, 0).end
    return -(-end // 256) * 256


def decode_plans(out: torch.Tensor, kv_indptr: torch.Tensor, plan: DecodePlan) -> None:
    """Write the plan of every layer; nothing waits for the device.

    Args:
        out: uint8 [L, bytes], one integer workspace of FlashInfer a layer.
        kv_indptr: int32 [L * bs + 1], where each layer's list of each request begins; one query a request.
        plan: its sizes.

    Raises:
        LightTransferError: a plan does not fit.
    """
    if plan.end > out.shape[1]:
        raise LightTransferError(f"a decode plan of {plan.end} bytes does not fit {out.shape[1]}")
    chunks = plan.chunks, plan.uneven_chunks
    write_plans(out, kv_indptr, plan.at, plan.requests, chunks, plan.places)


class GraphPlans:
    """The plans of ``layers`` different lists for the CUDA graphs of an attention backend."""

    def __init__(self, backend: Any, updater: Any, layers: int, max_requests: int) -> None:
        self._heads, self._kv_heads = updater.num_qo_heads, updater.num_kv_heads
        self._dim = updater.head_dim
        device = backend.workspace_buffer.device
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        size = plan_bytes(max_requests, self._kv_heads, self._processors)
        self.buffer = torch.zeros((layers, size), dtype=torch.uint8, device=device)
        self._workspace_bytes = backend.workspace_buffer.numel() * backend.workspace_buffer.element_size()
        self._plans: dict[int, DecodePlan] = {}

    def write(self, wrapper: Any, kv_indptr: torch.Tensor, requests: int) -> DecodePlan:
        """Plan the lists at ``kv_indptr``, of all layers; ``wrapper`` must have been planned once."""
        plan = self._plans.get(requests)
        if plan is None:
            plan = DecodePlan.like(
                plan_info(wrapper), requests, self._heads, self._kv_heads, self._dim, self._processors
            )
            needed = plan.partial_bytes + 4 * self._heads * plan.chunks
            if needed > self._workspace_bytes:
                raise LightTransferError(
                    f"decode: {needed} bytes of partial outputs do not fit FlashInfer's workspace of "
                    f"{self._workspace_bytes}; raise SGLANG_FLASHINFER_WORKSPACE_SIZE"
                )
            self._plans[requests] = plan
        decode_plans(self.buffer, kv_indptr, plan)
        return plan
