"""FlashInfer's decode plan for every layer, made on the device.

FlashInfer splits each request's list into chunks, so that all of them together fill the GPU, and the host
computes how. In dynamic mode only the device knows how long a layer's lists are. A plan for the longest they
could be is right for all layers but leaves much of the GPU idle where lists are short (a step of 12 requests
of 32K tokens took 1.2 times as long). So one kernel writes, for each layer, the plan that FlashInfer would
make for its own lists, and under CUDA graphs the host plans nothing at all.

Source: flashinfer/data/include/flashinfer/attention/scheduler.cuh, PrefillSplitQOKVIndptr and PrefillPlanImpl
(tensor-core decode is a prefill of one query a request).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lt_sglang.errors import LightTransferError

MIN_CHUNK: tl.constexpr = tl.constexpr(128)
BLOCK_ITEMS = 256


@dataclass(frozen=True)
class PlanLayout:
    """Where FlashInfer keeps a plan in its integer workspace; offsets in bytes (PrefillPlanInfo).

    chunks: most chunks of all requests together (padded_batch_size).
    """

    chunks: int
    total_rows: int
    request_indices: int
    query_tiles: int
    kv_tiles: int
    merge_indptr: int
    o_indptr: int
    chunk_size: int
    valid: int

    @classmethod
    def read(cls, plan_info: Sequence[int], requests: int, group: int) -> PlanLayout:
        """From a wrapper's plan of ``requests`` with ``group`` query heads a KV head, under CUDA graphs.

        Raises:
            LightTransferError: it is not the plan that this kernel knows how to write.
        """
        fields = [int(value) for value in plan_info]
        known = len(fields) == 15 and fields[13] and fields[14] and fields[3] >= group
        if not known or fields[1] != requests:
            raise LightTransferError(
                f"FlashInfer's decode plan {fields} of {requests} requests, {group} query heads a KV head, "
                "is not of the known form; use flashinfer-python 0.7.2"
            )
        return cls(
            chunks=fields[0],
            total_rows=fields[2],
            request_indices=fields[4],
            query_tiles=fields[5],
            kv_tiles=fields[6],
            merge_indptr=fields[7],
            o_indptr=fields[8],
            chunk_size=fields[9],
            valid=fields[12],
        )

    @property
    def end(self) -> int:
        """Bytes of one plan."""
        return self.valid + self.chunks


def plan_bytes(requests: int, group: int, kv_heads: int, processors: int) -> int:
    """Bytes that hold the plan of up to ``requests`` requests on a GPU of ``processors`` multiprocessors."""
    chunks = max(2 * processors // kv_heads, triton.cdiv(requests * group, 16) + requests)
    # Three arrays by chunk, two by request, a byte by chunk, two scalars; each aligned to 16 bytes.
    size = 12 * chunks + 8 * (requests + 2) + chunks + 16 * 9
    return int(triton.cdiv(size, 256) * 256)


@triton.jit(do_not_specialize=["requests", "chunks"])
def _decode_plans(  # type: ignore[no-untyped-def]
    plan_ptr,
    byte_ptr,
    stride,
    pointer_ptr,
    requests,
    chunks,
    at_total_rows,
    at_request_indices,
    at_query_tiles,
    at_kv_tiles,
    at_merge_indptr,
    at_o_indptr,
    at_chunk_size,
    at_valid,
    BLOCK: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    layer = tl.program_id(0)
    plan = plan_ptr + layer * (stride // 4)
    item = tl.arange(0, BLOCK)
    real = item < requests
    first = tl.load(pointer_ptr + layer * requests + item, mask=real, other=0)
    end = tl.load(pointer_ptr + layer * requests + item + 1, mask=real, other=0)
    length = tl.where(real, tl.maximum(end - first, 1), 0)
    # The smallest chunks that are not too many.
    low = tl.zeros([], tl.int32) + MIN_CHUNK
    high = tl.maximum(tl.max(length), MIN_CHUNK)
    while low < high:
        middle = (low + high) // 2
        if tl.sum((length + middle - 1) // middle) > chunks:
            low = middle + 1
        else:
            high = middle
    count = (length + low - 1) // low
    ends = tl.cumsum(count)
    start = ends - count
    total = tl.sum(count)
    tl.store(plan + at_chunk_size // 4, low)
    tl.store(plan + at_total_rows // 4, requests)
    tl.store(plan + at_o_indptr // 4, 0)
    tl.store(plan + at_merge_indptr // 4, 0)
    tl.store(plan + at_o_indptr // 4 + 1 + item, ends, mask=real)
    tl.store(plan + at_merge_indptr // 4 + 1 + item, ends, mask=real)
    for tile in range(0, tl.max(count)):
        here = real & (tile < count)
        tl.store(plan + at_request_indices // 4 + start + tile, item, mask=here)
        tl.store(plan + at_kv_tiles // 4 + start + tile, tile, mask=here)
    for block in range(0, chunks, BLOCK_ITEMS):
        chunk = block + tl.arange(0, BLOCK_ITEMS)
        inside = chunk < chunks
        tl.store(plan + at_query_tiles // 4 + chunk, 0, mask=inside)
        tl.store(byte_ptr + layer * stride + at_valid + chunk, (chunk < total).to(tl.uint8), mask=inside)


def decode_plans(out: torch.Tensor, pointers: torch.Tensor, requests: int, layout: PlanLayout) -> None:
    """Write the plan of every layer; nothing waits for the device.

    Args:
        out: uint8 [L, bytes], one integer workspace of FlashInfer a layer; rows aligned to 16 bytes.
        pointers: int32 [L * bs + 1], where each layer's list of each request begins.
        requests: bs. Each attends with one query.

    Raises:
        LightTransferError: a plan does not fit.
    """
    layers, size = out.shape
    if layout.end > size:
        raise LightTransferError(f"a decode plan of {layout.end} bytes does not fit {size}")
    _decode_plans[(layers,)](
        out.view(torch.int32),
        out,
        size,
        pointers,
        requests,
        layout.chunks,
        layout.total_rows,
        layout.request_indices,
        layout.query_tiles,
        layout.kv_tiles,
        layout.merge_indptr,
        layout.o_indptr,
        layout.chunk_size,
        layout.valid,
        BLOCK=triton.next_power_of_2(max(requests, 16)),
        BLOCK_ITEMS=BLOCK_ITEMS,
    )
