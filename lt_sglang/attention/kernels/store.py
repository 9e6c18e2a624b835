"""Writes new K and V to rows of the arena."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _store_rows(  # type: ignore[no-untyped-def]
    keys_ptr, values_ptr, k_ptr, v_ptr, rows_ptr, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0)
    item = tl.arange(0, BLOCK)
    valid = item < WIDTH
    row = tl.load(rows_ptr + token).to(tl.int64)
    k = tl.load(k_ptr + token.to(tl.int64) * k_stride + item, mask=valid)
    v = tl.load(v_ptr + token.to(tl.int64) * v_stride + item, mask=valid)
    tl.store(keys_ptr + row * WIDTH + item, k, mask=valid)
    tl.store(values_ptr + row * WIDTH + item, v, mask=valid)


def store_rows(
    keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """keys[rows] = k and values[rows] = v, for [n, kv heads, dim] of the same dtype; rows int32 [n]."""
    width = keys[0].numel()
    _store_rows[(len(rows),)](
        keys,
        values,
        k,
        v,
        rows,
        k.stride(0),
        v.stride(0),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )
