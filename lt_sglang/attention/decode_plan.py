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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lt_sglang.errors import LightTransferError

MIN_CHUNK: tl.constexpr = tl.constexpr(128)
BLOCK_ITEMS = 256
# Chunks that may be planned for each place on the GPU (each multiprocessor has two), beside one a request.
CHUNKS_PER_PLACE = 3
# What starting a chunk costs, in tokens of attention.
START_TOKENS = 64
ALIGN = 16


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _places(kv_heads: int, processors: int) -> int:
    return max(2 * processors // kv_heads, 1)


def _most_chunks(requests: int, places: int) -> int:
    return CHUNKS_PER_PLACE * places + requests


@dataclass(frozen=True)
class DecodePlan:
    """Where a plan of ``requests`` queries and at most ``chunks`` chunks lies in FlashInfer's workspaces.

    tile: queries times heads that one chunk takes (cta_tile_q). places: chunks of one KV head that the GPU
    runs at a time. partial_bytes: of the chunks' outputs before they are merged; their sums follow.
    """

    requests: int
    chunks: int
    tile: int
    places: int
    partial_bytes: int

    @classmethod
    def like(
        cls, plan_info: Sequence[int], requests: int, heads: int, kv_heads: int, dim: int, processors: int
    ) -> DecodePlan:
        """For a wrapper that FlashInfer planned under CUDA graphs; ``processors``: the GPU's multiprocessors.

        Raises:
            LightTransferError: its plan is not of the form that this kernel knows.
        """
        fields = [int(value) for value in plan_info]
        known = len(fields) == 15 and fields[13] and fields[14] and fields[3] >= heads // kv_heads
        if not known or fields[1] != requests:
            raise LightTransferError(
                f"FlashInfer's decode plan {fields} of {requests} requests, {heads} query and {kv_heads} KV "
                "heads is not of the known form; use flashinfer-python 0.7.2"
            )
        places = _places(kv_heads, processors)
        chunks = _most_chunks(requests, places)
        return cls(requests, chunks, fields[3], places, _aligned(heads * chunks * dim * 4))

    @property
    def query_tiles(self) -> int:
        """Offset in bytes, like the next ones; request indices come first."""
        return _aligned(4 * self.chunks)

    @property
    def kv_tiles(self) -> int:
        return 2 * self.query_tiles

    @property
    def o_indptr(self) -> int:
        return 3 * self.query_tiles

    @property
    def merge_indptr(self) -> int:
        return self.o_indptr + _aligned(4 * (self.requests + 1))

    @property
    def chunk_size(self) -> int:
        return self.merge_indptr + _aligned(4 * (self.requests + 1))

    @property
    def total_rows(self) -> int:
        return self.chunk_size + ALIGN

    @property
    def valid(self) -> int:
        return self.total_rows + ALIGN

    @property
    def end(self) -> int:
        """Bytes of one plan."""
        return _aligned(self.valid + self.chunks)

    @property
    def info(self) -> list[int]:
        """FlashInfer's PrefillPlanInfo: under CUDA graphs, lists are split."""
        return [
            self.chunks,
            self.requests,
            self.total_rows,
            self.tile,
            0,
            self.query_tiles,
            self.kv_tiles,
            self.merge_indptr,
            self.o_indptr,
            self.chunk_size,
            0,
            self.partial_bytes,
            self.valid,
            1,
            1,
        ]


def plan_bytes(requests: int, kv_heads: int, processors: int) -> int:
    """Bytes of the largest plan of up to ``requests`` requests; a multiple of 256."""
    places = _places(kv_heads, processors)
    end = DecodePlan(requests, _most_chunks(requests, places), 0, places, 0).end
    return -(-end // 256) * 256


@contextmanager
def planned(wrapper: Any, plan: DecodePlan, workspace: torch.Tensor) -> Iterator[None]:
    """Let a decode wrapper run ``plan``, written into ``workspace`` (uint8), instead of its own."""
    own = wrapper._int_workspace_buffer, wrapper._plan_info
    wrapper._int_workspace_buffer, wrapper._plan_info = workspace, plan.info
    try:
        yield
    finally:
        wrapper._int_workspace_buffer, wrapper._plan_info = own


@triton.jit(do_not_specialize=["requests", "chunks"])
def _decode_plans(  # type: ignore[no-untyped-def]
    plan_ptr,
    byte_ptr,
    stride,
    pointer_ptr,
    requests,
    chunks,
    places,
    query_tiles,
    kv_tiles,
    o_indptr,
    merge_indptr,
    chunk_size,
    total_rows,
    valid,
    START: tl.constexpr,
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
    longest = tl.max(length)
    tokens = tl.sum(length.to(tl.float32))
    size = longest
    best = tl.full([], float("inf"), tl.float32)
    for group in tl.static_range(0, 4):
        # The longest list in 1 to 16 chunks, then in 17 to 1024 in ever larger steps.
        candidate = group * 16 + tl.arange(0, 16)
        more = (16.0 * tl.exp2((candidate - 15).to(tl.float32) / 8)).to(tl.int32)
        parts = tl.where(candidate < 16, candidate + 1, more)
        tried = tl.maximum((longest + parts - 1) // parts, MIN_CHUNK)
        count = tl.sum((length[None, :] + tried[:, None] - 1) // tried[:, None], 1)
        chunk = tried.to(tl.float32)
        # Chunks of one size run in whole rounds; others fill the gaps, but for some of the last one.
        rounds = ((count + places - 1) // places).to(tl.float32) * (chunk + START)
        filled = (tokens + count.to(tl.float32) * START) / places + 0.7 * chunk
        time = tl.where(count.to(tl.float32) * chunk < 1.15 * tokens, rounds, filled)
        time = tl.where(count <= chunks, time, float("inf"))
        least = tl.min(time)
        size = tl.where(least < best, tl.max(tl.where(time == least, tried, 0)), size)
        best = tl.minimum(best, least)
    whole = length // size
    rest = ((length % size) > 0).to(tl.int32)
    ends = tl.cumsum(whole + rest)
    tl.store(plan + chunk_size // 4, size)
    tl.store(plan + total_rows // 4, requests)
    tl.store(plan + o_indptr // 4, 0)
    tl.store(plan + merge_indptr // 4, 0)
    tl.store(plan + o_indptr // 4 + 1 + item, ends, mask=real)
    tl.store(plan + merge_indptr // 4 + 1 + item, ends, mask=real)
    # Whole chunks first: the small ones fill the gaps at the end.
    start = tl.cumsum(whole) - whole
    for tile in range(0, tl.max(whole)):
        here = tile < whole
        tl.store(plan + start + tile, item, mask=here)
        tl.store(plan + kv_tiles // 4 + start + tile, tile, mask=here)
    last = tl.sum(whole) + tl.cumsum(rest) - rest
    tl.store(plan + last, item, mask=rest > 0)
    tl.store(plan + kv_tiles // 4 + last, whole, mask=rest > 0)
    total = tl.sum(whole + rest)
    for block in range(0, chunks, BLOCK_ITEMS):
        position = block + tl.arange(0, BLOCK_ITEMS)
        inside = position < chunks
        tl.store(plan + query_tiles // 4 + position, 0, mask=inside)
        tl.store(byte_ptr + layer * stride + valid + position, (position < total).to(tl.uint8), mask=inside)


def decode_plans(out: torch.Tensor, pointers: torch.Tensor, plan: DecodePlan) -> None:
    """Write the plan of every layer; nothing waits for the device.

    Args:
        out: uint8 [L, bytes], one integer workspace of FlashInfer a layer.
        pointers: int32 [L * bs + 1], where each layer's list of each request begins; one query a request.

    Raises:
        LightTransferError: a plan does not fit.
    """
    layers, size = out.shape
    if plan.end > size:
        raise LightTransferError(f"a decode plan of {plan.end} bytes does not fit {size}")
    _decode_plans[(layers,)](
        out.view(torch.int32),
        out,
        size,
        pointers,
        plan.requests,
        plan.chunks,
        plan.places,
        plan.query_tiles,
        plan.kv_tiles,
        plan.o_indptr,
        plan.merge_indptr,
        plan.chunk_size,
        plan.total_rows,
        plan.valid,
        START=START_TOKENS,
        BLOCK=triton.next_power_of_2(max(plan.requests, 16)),
        BLOCK_ITEMS=BLOCK_ITEMS,
    )


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

    def write(self, wrapper: Any, pointers: torch.Tensor, requests: int) -> DecodePlan:
        """Plan the lists at ``pointers``, of all layers; ``wrapper`` must have been planned once."""
        plan = self._plans.get(requests)
        if plan is None:
            plan = DecodePlan.like(
                wrapper._plan_info, requests, self._heads, self._kv_heads, self._dim, self._processors
            )
            needed = plan.partial_bytes + 4 * self._heads * plan.chunks
            if needed > self._workspace_bytes:
                raise LightTransferError(
                    f"decode: {needed} bytes of partial outputs do not fit FlashInfer's workspace of "
                    f"{self._workspace_bytes}; raise SGLANG_FLASHINFER_WORKSPACE_SIZE"
                )
            self._plans[requests] = plan
        decode_plans(self.buffer, pointers, plan)
        return plan
