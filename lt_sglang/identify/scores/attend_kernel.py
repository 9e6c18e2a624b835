"""Streaming attention of the last queries, as a Triton kernel.

The queries of one kv head (GROUP heads x W queries) share a tile; the selected keys are split over programs,
and whoever combines the splits adds them up in a fixed order. This and the other kernels of the scores run
under TRITON_INTERPRET=1, need nothing above sm80 and never wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lt_sglang.identify.scores.evidence import Evidence, Selected, Strided
from lt_sglang.identify.scores.reference import LOG2E

TILE_ROWS = 64  # what one warp group multiplies at a time on Hopper
TILE_KEYS = 128
TILE_BYTES = 32768  # of keys, and of values: both, or two stages of half of both, fit the 100 KB of an sm86
PROGRAMS = 256  # about two for each multiprocessor of an H100


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of two; Triton's own takes 5 us a call."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Splits:
    """Streaming attention of every query over each split of its selected keys; H heads, padded ones included.

    lse: float32 [D, splits, W, H], log-sum-exp to base 2 of the scaled scores; -inf where none is seen.
    output: float32 [D, splits, W, H, dim], softmax attention within the split; None if not asked for.
    """

    lse: torch.Tensor
    output: torch.Tensor | None


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    lse_ptr,
    output_ptr,
    query_of,
    key_of,
    value_of,
    chosen_queries,
    chosen_keys,
    queries,
    keys,
    scale_log2,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    WITH_VALUES: tl.constexpr,
):
    tiles = tl.cdiv(queries * GROUP, BLOCK_M)
    request = (tl.program_id(0) // tiles).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    # Rows of the tile run over the group's heads, then over the queries.
    item = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_tile = item < queries * GROUP
    head = kv_head * GROUP + item % GROUP
    which = request * queries + item // GROUP
    query_row = tl.load(chosen_queries.rows + which, mask=in_tile, other=-1).to(tl.int64)
    position = tl.load(chosen_queries.positions + which, mask=in_tile, other=-1)
    is_query = query_row >= 0
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < DIM
    query = tl.load(
        query_of.at + (query_row * query_of.row + head * query_of.head)[:, None] + dim[None, :],
        mask=is_query[:, None] & in_dim[None, :],
        other=0.0,
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for offset in range(0, SPAN, BLOCK_N):
        place = split * SPAN + offset + tl.arange(0, BLOCK_N)
        in_keys = place < keys
        key_row = tl.load(chosen_keys.rows + request * keys + place, mask=in_keys, other=-1).to(tl.int64)
        key_position = tl.load(chosen_keys.positions + request * keys + place, mask=in_keys, other=-1)
        is_key = key_row >= 0
        key = tl.load(
            key_of.at + (key_row * key_of.row + kv_head * key_of.head)[None, :] + dim[:, None],
            mask=is_key[None, :] & in_dim[:, None],
            other=0.0,
        )
        score = tl.dot(query, key.to(query.dtype), input_precision="tf32x3") * scale_log2
        seen = (is_query[:, None] & is_key[None, :]) & (key_position[None, :] <= position[:, None])
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # A row that has seen nothing yet has no maximum to subtract.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        if WITH_VALUES:
            value = tl.load(
                value_of.at + (key_row * value_of.row + kv_head * value_of.head)[:, None] + dim[None, :],
                mask=is_key[:, None] & in_dim[None, :],
                other=0.0,
            ).to(query.dtype)
            acc = acc * shrink[:, None] + tl.dot(weight.to(query.dtype), value, input_precision="tf32x3")
        top = new_top
    out = ((request * tl.num_programs(2) + split) * queries + item // GROUP) * HEADS + head
    # Nothing seen: log2(0) = -inf, and an output of 0 / 1.
    tl.store(lse_ptr + out, tl.where(total > 0, top, 0.0) + tl.log2(total), mask=in_tile)
    if WITH_VALUES:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(output_ptr + out[:, None] * DIM + dim[None, :], acc, mask=in_tile[:, None] & in_dim[None, :])


def attend(evidence: Evidence, with_values: bool) -> Splits:
    """Streaming attention of the last queries; the number of splits follows from the shapes."""
    requests, queries = evidence.query_rows.shape
    keys = evidence.key_rows.shape[1]
    _, heads, dim = evidence.query.shape
    kv_heads = evidence.keys.shape[1]
    group = heads // kv_heads
    block_dim = max(16, power_of_2(dim))
    half = evidence.query.element_size() == 2  # float32 takes twice the shared memory, and more registers
    block_m = min(TILE_ROWS if half else TILE_ROWS // 2, max(16, power_of_2(group * queries)))
    block_n = min(TILE_KEYS, max(32, TILE_BYTES // (block_dim * evidence.query.element_size())))
    tiles = requests * cdiv(queries * group, block_m)
    if not PROGRAMS <= 2 * tiles * kv_heads * cdiv(keys, block_n) <= 2 * PROGRAMS:
        # Too few programs: smaller splits. Too many: each loops over smaller blocks, and loads one ahead.
        block_n //= 2
    # A power of two, so that few forms of the kernel are compiled.
    span = block_n * power_of_2(cdiv(cdiv(keys, block_n), cdiv(PROGRAMS, tiles * kv_heads)))
    number = cdiv(keys, span)
    device = evidence.query.device
    shape = (requests, number, queries, heads)
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    output = torch.empty((*shape, dim), dtype=torch.float32, device=device) if with_values else None
    _attend[(tiles, kv_heads, number)](
        lse,
        lse if output is None else output,
        Strided.of(evidence.query),
        Strided.of(evidence.keys),
        Strided.of(evidence.values),
        chosen_queries=Selected(evidence.query_rows, evidence.query_positions),
        chosen_keys=Selected(evidence.key_rows, evidence.key_positions),
        queries=queries,
        keys=keys,
        scale_log2=evidence.scale * LOG2E,
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        BLOCK_DIM=block_dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SPAN=span,
        WITH_VALUES=with_values,
        num_warps=4 if block_dim <= 128 else 8,
        num_stages=2 if half else 1,
    )
    return Splits(lse, output)
