"""Triton kernels of the scores: streaming attention of the deciding queries, and what is read off it.

The queries of one kv head (GROUP heads x W queries) share a tile; the selected keys are split over programs,
and what combines the splits adds them up in a fixed order. They run under TRITON_INTERPRET=1 and need nothing
above sm80.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lt_sglang.selection.evidence import Evidence
from lt_sglang.selection.reference import LOG2E

TILE_ROWS = 64  # what one warp group multiplies at a time on Hopper
TILE_KEYS = 128
TILE_BYTES = 32768  # of keys, and of values: both, or two stages of half of both, fit the 100 KB of an sm86
PROGRAMS = 256  # about two for each multiprocessor of an H100
WARP_ELEMENTS = 2048  # float32 that a warp keeps in registers while it adds up splits
MINUS_ZERO = tl.constexpr(-(1 << 31))  # the bits of -0.0 as an int32; Triton would make a literal -0.0 a 0.0


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
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
    query_ptr,
    key_ptr,
    value_ptr,
    query_rows_ptr,
    query_positions_ptr,
    key_rows_ptr,
    key_positions_ptr,
    query_row_stride,
    query_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
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
    query_row = tl.load(query_rows_ptr + which, mask=in_tile, other=-1).to(tl.int64)
    position = tl.load(query_positions_ptr + which, mask=in_tile, other=-1)
    is_query = query_row >= 0
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < DIM
    query = tl.load(
        query_ptr + (query_row * query_row_stride + head * query_head_stride)[:, None] + dim[None, :],
        mask=is_query[:, None] & in_dim[None, :],
        other=0.0,
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for offset in range(0, SPAN, BLOCK_N):
        place = split * SPAN + offset + tl.arange(0, BLOCK_N)
        in_keys = place < keys
        key_row = tl.load(key_rows_ptr + request * keys + place, mask=in_keys, other=-1).to(tl.int64)
        key_position = tl.load(key_positions_ptr + request * keys + place, mask=in_keys, other=-1)
        is_key = key_row >= 0
        key = tl.load(
            key_ptr + (key_row * key_row_stride + kv_head * key_head_stride)[None, :] + dim[:, None],
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
                value_ptr
                + (key_row * value_row_stride + kv_head * value_head_stride)[:, None]
                + dim[None, :],
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
    """Streaming attention of the deciding queries; the number of splits follows from the shapes."""
    requests, queries = evidence.query_rows.shape
    keys = evidence.key_rows.shape[1]
    _, heads, dim = evidence.query.shape
    kv_heads = evidence.keys.shape[1]
    group = heads // kv_heads
    block_dim = max(16, _power_of_2(dim))
    half = evidence.query.element_size() == 2  # float32 takes twice the shared memory, and more registers
    block_m = min(TILE_ROWS if half else TILE_ROWS // 2, max(16, _power_of_2(group * queries)))
    block_n = min(TILE_KEYS, max(32, TILE_BYTES // (block_dim * evidence.query.element_size())))
    tiles = requests * _cdiv(queries * group, block_m)
    if not PROGRAMS <= 2 * tiles * kv_heads * _cdiv(keys, block_n) <= 2 * PROGRAMS:
        # Too few programs: smaller splits. Too many: each loops over smaller blocks, and loads one ahead.
        block_n //= 2
    # A power of two, so that few forms of the kernel are compiled.
    span = block_n * _power_of_2(_cdiv(_cdiv(keys, block_n), _cdiv(PROGRAMS, tiles * kv_heads)))
    number = _cdiv(keys, span)
    device = evidence.query.device
    shape = (requests, number, queries, heads)
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    output = torch.empty((*shape, dim), dtype=torch.float32, device=device) if with_values else None
    _attend[(tiles, kv_heads, number)](
        lse,
        lse if output is None else output,
        evidence.query,
        evidence.keys,
        evidence.values,
        evidence.query_rows,
        evidence.query_positions,
        evidence.key_rows,
        evidence.key_positions,
        evidence.query.stride(0),
        evidence.query.stride(1),
        evidence.keys.stride(0),
        evidence.keys.stride(1),
        evidence.values.stride(0),
        evidence.values.stride(1),
        queries,
        keys,
        evidence.scale * LOG2E,
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


@triton.jit
def _reduce_masses(  # type: ignore[no-untyped-def]
    out_ptr,
    split_lse_ptr,
    lse_ptr,
    query_rows_ptr,
    lse_row_stride,
    lse_head_stride,
    queries,
    heads,
    total_heads,
    splits,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAXIMUM: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    items = queries * HEADS
    split = tl.arange(0, SPLITS)
    in_splits = split < splits
    result = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, items, BLOCK):
        item = offset + tl.arange(0, BLOCK)
        in_items = item < items
        head = item % HEADS
        row = tl.load(query_rows_ptr + request * queries + item // HEADS, mask=in_items, other=-1)
        count += ((row >= 0) & (head == 0)).to(tl.int32)
        counted = (row >= 0) & (head < heads)
        lse = tl.load(
            lse_ptr + row.to(tl.int64) * lse_row_stride + head * lse_head_stride, mask=counted, other=0.0
        )
        part = tl.load(
            split_lse_ptr + (request * splits + split[:, None]) * items + item[None, :],
            mask=in_splits[:, None] & counted[None, :],
            other=float("-inf"),
        )
        # Rounding in the log-sum-exp must not make a mass of more than 1.
        mass = tl.minimum(tl.sum(tl.exp2(part - lse[None, :]), 0), 1.0)
        if MAXIMUM:
            result = tl.maximum(result, tl.where(counted, 1.0 - mass, 0.0))
        else:
            result += mass
    if MAXIMUM:
        tl.store(out_ptr + request, tl.max(result, 0))
    else:
        tl.store(out_ptr + request, tl.sum(result, 0) / (tl.sum(count, 0) * total_heads).to(tl.float32))


def _reduced_masses(evidence: Evidence, splits: Splits, maximum: bool) -> torch.Tensor:
    requests, number, queries, heads = splits.lse.shape
    padded = _power_of_2(number)
    out = torch.empty(requests, dtype=torch.float32, device=evidence.query.device)
    _reduce_masses[(requests,)](
        out,
        splits.lse,
        evidence.lse,
        evidence.query_rows,
        evidence.lse.stride(0),
        evidence.lse.stride(1),
        queries,
        evidence.heads,
        evidence.total_heads,
        number,
        HEADS=heads,
        SPLITS=padded,
        BLOCK=min(2048, 16384 // padded),
        MAXIMUM=maximum,
        num_warps=16,
    )
    return out


def mean_mass(evidence: Evidence, splits: Splits) -> torch.Tensor:
    """float32 [D]: this rank's part of the mean mass over all ranks' heads and the queries."""
    return _reduced_masses(evidence, splits, maximum=False)


def largest_discarded_mass(evidence: Evidence, splits: Splits) -> torch.Tensor:
    """float32 [D]: maximum over this rank's heads and the queries of 1 - mass; 0 without heads."""
    return _reduced_masses(evidence, splits, maximum=True)


@triton.jit
def _output_rows(  # type: ignore[no-untyped-def]
    rows_ptr,
    laziness_bits_ptr,
    split_lse_ptr,
    split_output_ptr,
    attention_ptr,
    query_rows_ptr,
    attention_row_stride,
    attention_head_stride,
    queries,
    heads,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    which = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    request = which // queries
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < DIM
    row = tl.load(query_rows_ptr + which).to(tl.int64)
    if SPLITS > 0:
        # Loaded before anything waits for `row`; what absent queries and padded heads hold is dropped below.
        split = tl.arange(0, SPLITS)
        in_splits = split < splits
        part = ((request * splits + split) * queries + which % queries) * HEADS + head
        streamed = tl.load(
            split_output_ptr + part[:, None] * DIM + dim[None, :],
            mask=in_splits[:, None] & in_dim[None, :],
            other=0.0,
        )
        lse = tl.load(split_lse_ptr + part, mask=in_splits, other=float("-inf"))
    # Absent queries and padded heads are zeros, so that they add nothing to the projection.
    wanted = in_dim & (row >= 0) & (head < heads)
    output = tl.load(
        attention_ptr + row * attention_row_stride + head * attention_head_stride + dim,
        mask=wanted,
        other=0.0,
    ).to(tl.float32)
    if SPLITS > 0:
        top = tl.max(lse, 0)
        weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weight, 0)
        output -= tl.sum(streamed * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
        output = tl.where(wanted, output, 0.0)
    tl.store(rows_ptr + (which * HEADS + head) * DIM + dim, output.to(rows_ptr.dtype.element_ty), mask=in_dim)
    if (head == 0) & (which % queries == 0):
        tl.store(laziness_bits_ptr + request, MINUS_ZERO)


def output_rows(evidence: Evidence, splits: Splits | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Full attention of the deciding queries, minus streaming attention if its splits are given.

    Returns:
        rows: [D * W, H * dim] in the model's dtype; zeros for absent queries and padded heads.
        laziness: float32 [D], all -0.0, from which ``negative_ratio`` starts.
    """
    requests, queries = evidence.query_rows.shape
    _, heads, dim = evidence.query.shape
    attention = evidence.attention
    rows = torch.empty((requests * queries, heads * dim), dtype=attention.dtype, device=attention.device)
    laziness = torch.empty(requests, dtype=torch.float32, device=attention.device)
    number = 0 if splits is None else splits.lse.shape[1]
    padded = _power_of_2(number) if number else 0
    block_dim = _power_of_2(dim)
    _output_rows[(requests * queries, heads)](
        rows,
        laziness.view(torch.int32),
        rows if splits is None else splits.lse,
        rows if splits is None else splits.output,
        attention,
        evidence.query_rows,
        attention.stride(0),
        attention.stride(1),
        queries,
        evidence.heads,
        number,
        HEADS=heads,
        DIM=dim,
        BLOCK_DIM=block_dim,
        SPLITS=padded,
        num_warps=max(1, min(8, padded * block_dim // WARP_ELEMENTS)),
    )
    return rows, laziness


@triton.jit
def _compare_rows(  # type: ignore[no-untyped-def]
    out_ptr,
    projected_ptr,
    hidden_ptr,
    query_rows_ptr,
    projected_row_stride,
    hidden_row_stride,
    queries,
    hidden,
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,
    COSINE: tl.constexpr,
):
    which = tl.program_id(0).to(tl.int64)
    row = tl.load(query_rows_ptr + which).to(tl.int64)
    before_square = tl.zeros([BLOCK], tl.float32)
    other_square = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, hidden, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        wanted = (column < hidden) & (row >= 0)
        before = tl.load(hidden_ptr + row * hidden_row_stride + column, mask=wanted, other=0.0).to(tl.float32)
        other = tl.load(projected_ptr + which * projected_row_stride + column, mask=wanted, other=0.0)
        other = other.to(tl.float32)
        if COSINE:
            other += before
            product += before * other
        before_square += before * before
        other_square += other * other
    tiny = 1.1754943508222875e-38
    size = tl.sqrt(tl.sum(before_square, 0))
    other_size = tl.sqrt(tl.sum(other_square, 0))
    if COSINE:
        request = which // queries
        place = tl.arange(0, BLOCK_W)
        rows = tl.load(query_rows_ptr + request * queries + place, mask=place < queries, other=-1)
        count = tl.sum((rows >= 0).to(tl.int32), 0).to(tl.float32)
        cosine = tl.sum(product, 0) / tl.maximum(size * other_size, tiny)
        tl.store(out_ptr + which, cosine / count)
    else:
        # With the sign bit set, a larger ratio has larger bits: an exact minimum of the negative ratios,
        # whatever the order of the programs.
        ratio = other_size / tl.maximum(size, tiny)
        tl.atomic_max(out_ptr + which // queries, ratio.to(tl.int32, bitcast=True) | MINUS_ZERO)


def _compare(evidence: Evidence, projected: torch.Tensor, out: torch.Tensor, cosine: bool) -> None:
    assert evidence.hidden is not None
    requests, queries = evidence.query_rows.shape
    hidden = evidence.hidden.shape[1]
    block = min(4096, _power_of_2(hidden))
    _compare_rows[(requests * queries,)](
        out,
        projected,
        evidence.hidden,
        evidence.query_rows,
        projected.stride(0),
        evidence.hidden.stride(0),
        queries,
        hidden,
        BLOCK_W=_power_of_2(queries),
        BLOCK=block,
        COSINE=cosine,
        num_warps=max(1, min(8, block // 512)),
    )


def negative_ratio(evidence: Evidence, projected: torch.Tensor, laziness: torch.Tensor) -> None:
    """Lower ``laziness`` [D] to minus the largest ||projected|| / ||hidden|| of each request's queries.

    Args:
        projected: [D * W, hidden], reduced over the ranks.
        laziness: float32 [D] from ``output_rows``, changed in place.
    """
    _compare(evidence, projected, laziness.view(torch.int32), cosine=False)


def mean_cosine(evidence: Evidence, projected: torch.Tensor) -> torch.Tensor:
    """float32 [D]: mean over the queries of cos(hidden, hidden + projected); projected as above."""
    shares = torch.empty(evidence.query_rows.shape, dtype=torch.float32, device=projected.device)
    _compare(evidence, projected, shares, cosine=True)
    return shares.sum(1)
