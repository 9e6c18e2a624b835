"""What the attention weight on the selected keys adds up to, as a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.identify.scores.attend_kernel import Splits, power_of_2
from lt_sglang.identify.scores.evidence import Evidence, Strided


@triton.jit
def _reduce_masses(  # type: ignore[no-untyped-def]
    out_ptr,
    split_lse_ptr,
    lse_of,
    query_rows_ptr,
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
        lse = tl.load(lse_of.at + row.to(tl.int64) * lse_of.row + head * lse_of.head, mask=counted, other=0.0)
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
    padded = power_of_2(number)
    out = torch.empty(requests, dtype=torch.float32, device=evidence.query.device)
    _reduce_masses[(requests,)](
        out,
        splits.lse,
        Strided.of(evidence.lse),
        evidence.query_rows,
        queries=queries,
        heads=evidence.heads,
        total_heads=evidence.total_heads,
        splits=number,
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
