"""Writes FlashInfer's decode plans on the device (attention/decode_plan.py says why)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MIN_CHUNK: tl.constexpr = tl.constexpr(128)
BLOCK_ITEMS = 256
# What starting a chunk costs, in tokens of attention.
START_TOKENS = 64
# Of this length and more, lists of one length may be cut into more rounds; windows only lose by it.
LONG_TOKENS = 4096


class PlanOffsets(NamedTuple):
    """Bytes at which the arrays of one plan begin, multiples of 16; request indices come first, at 0."""

    query_tiles: int
    kv_tiles: int
    o_indptr: int
    merge_indptr: int
    chunk_size: int
    total_rows: int
    valid: int


@triton.jit(do_not_specialize=["requests", "chunks", "uneven"])
def _decode_plans(  # type: ignore[no-untyped-def]
    plan_ptr,
    byte_ptr,
    stride,
    kv_indptr_ptr,
    at,
    requests,
    chunks,
    uneven,
    places,
    START: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    layer = tl.program_id(0)
    plan = plan_ptr + layer * (stride // 4)
    item = tl.arange(0, BLOCK)
    real = item < requests
    first = tl.load(kv_indptr_ptr + layer * requests + item, mask=real, other=0)
    end = tl.load(kv_indptr_ptr + layer * requests + item + 1, mask=real, other=0)
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
        even = count.to(tl.float32) * chunk < 1.15 * tokens
        time = tl.where(even, rounds, filled)
        time = tl.where(count <= tl.where(even & (longest >= LONG), chunks, uneven), time, float("inf"))
        least = tl.min(time)
        size = tl.where(least < best, tl.max(tl.where(time == least, tried, 0)), size)
        best = tl.minimum(best, least)
    whole = length // size
    rest = ((length % size) > 0).to(tl.int32)
    ends = tl.cumsum(whole + rest)
    tl.store(plan + at.chunk_size // 4, size)
    tl.store(plan + at.total_rows // 4, requests)
    tl.store(plan + at.o_indptr // 4, 0)
    tl.store(plan + at.merge_indptr // 4, 0)
    tl.store(plan + at.o_indptr // 4 + 1 + item, ends, mask=real)
    tl.store(plan + at.merge_indptr // 4 + 1 + item, ends, mask=real)
    # Whole chunks first: the small ones fill the gaps at the end.
    start = tl.cumsum(whole) - whole
    for tile in range(0, tl.max(whole)):
        here = tile < whole
        tl.store(plan + start + tile, item, mask=here)
        tl.store(plan + at.kv_tiles // 4 + start + tile, tile, mask=here)
    last = tl.sum(whole) + tl.cumsum(rest) - rest
    tl.store(plan + last, item, mask=rest > 0)
    tl.store(plan + at.kv_tiles // 4 + last, whole, mask=rest > 0)
    total = tl.sum(whole + rest)
    for block in range(0, chunks, BLOCK_ITEMS):
        position = block + tl.arange(0, BLOCK_ITEMS)
        inside = position < chunks
        tl.store(plan + at.query_tiles // 4 + position, 0, mask=inside)
        tl.store(
            byte_ptr + layer * stride + at.valid + position, (position < total).to(tl.uint8), mask=inside
        )


def write_plans(
    out: torch.Tensor,
    kv_indptr: torch.Tensor,
    at: PlanOffsets,
    requests: int,
    chunks: tuple[int, int],
    places: int,
) -> None:
    """Write the plan of every layer; nothing waits for the device.

    Args:
        out: uint8 [L, bytes], one integer workspace of FlashInfer a layer.
        kv_indptr: int32 [L * bs + 1], where each layer's list of each request begins; one query a request.
        at: where in a workspace the arrays begin.
        requests: bs.
        chunks: most chunks of a plan, of long lists of one length and of others.
        places: chunks of one KV head that the GPU runs at a time.
    """
    layers, size = out.shape
    _decode_plans[(layers,)](
        out.view(torch.int32),
        out,
        size,
        kv_indptr,
        at=at,
        requests=requests,
        chunks=chunks[0],
        uneven=chunks[1],
        places=places,
        START=START_TOKENS,
        LONG=LONG_TOKENS,
        BLOCK=triton.next_power_of_2(max(requests, 16)),
        BLOCK_ITEMS=BLOCK_ITEMS,
    )
