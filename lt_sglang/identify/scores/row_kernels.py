"""Rows for the output projection, and the projected rows beside the residual stream, as Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.identify.scores.attend_kernel import Splits, power_of_2
from lt_sglang.identify.scores.evidence import Evidence, Strided

WARP_ELEMENTS = 2048  # float32 that a warp keeps in registers while it adds up splits
MINUS_ZERO = tl.constexpr(-(1 << 31))  # the bits of -0.0 as an int32; Triton would make a literal -0.0 a 0.0


@triton.jit
def _output_rows(  # type: ignore[no-untyped-def]
    rows_ptr,
    laziness_bits_ptr,
    split_lse_ptr,
    split_output_ptr,
    attention_of,
    query_rows_ptr,
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
        attention_of.at + row * attention_of.row + head * attention_of.head + dim,
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
    """Full attention of the last queries, minus streaming attention if its splits are given.

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
    padded = power_of_2(number) if number else 0
    block_dim = power_of_2(dim)
    _output_rows[(requests * queries, heads)](
        rows,
        laziness.view(torch.int32),
        rows if splits is None else splits.lse,
        rows if splits is None else splits.output,
        Strided.of(attention),
        evidence.query_rows,
        queries=queries,
        heads=evidence.heads,
        splits=number,
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
    block = min(4096, power_of_2(hidden))
    _compare_rows[(requests * queries,)](
        out,
        projected,
        evidence.hidden,
        evidence.query_rows,
        projected_row_stride=projected.stride(0),
        hidden_row_stride=evidence.hidden.stride(0),
        queries=queries,
        hidden=hidden,
        BLOCK_W=power_of_2(queries),
        BLOCK=block,
        COSINE=cosine,
        num_warps=max(1, min(8, block // 512)),
    )


def negative_ratio(evidence: Evidence, projected: torch.Tensor, laziness: torch.Tensor) -> None:
    """Lower ``laziness`` [D] to minus the largest ||projected|| / ||hidden|| of each request's queries.

    Args:
        evidence: of D requests.
        projected: [D * W, hidden], reduced over the ranks.
        laziness: float32 [D] from ``output_rows``, changed in place.
    """
    _compare(evidence, projected, laziness.view(torch.int32), cosine=False)


def mean_cosine(evidence: Evidence, projected: torch.Tensor) -> torch.Tensor:
    """float32 [D]: mean over the queries of cos(hidden, hidden + projected); projected as above."""
    shares = torch.empty(evidence.query_rows.shape, dtype=torch.float32, device=projected.device)
    _compare(evidence, projected, shares, cosine=True)
    return shares.sum(1)
