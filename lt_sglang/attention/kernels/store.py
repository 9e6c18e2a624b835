"""Writes new K and V to rows of a flat pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.memory.kv import KV


@triton.jit
def _store_kv(  # type: ignore[no-untyped-def]
    pool, new, out_cache_loc_ptr, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0)
    item = tl.arange(0, BLOCK)
    valid = item < WIDTH
    row = tl.load(out_cache_loc_ptr + token).to(tl.int64)
    k = tl.load(new.k + token.to(tl.int64) * k_stride + item, mask=valid)
    v = tl.load(new.v + token.to(tl.int64) * v_stride + item, mask=valid)
    tl.store(pool.k + row * WIDTH + item, k, mask=valid)
    tl.store(pool.v + row * WIDTH + item, v, mask=valid)


def store_kv(pool: KV, out_cache_loc: torch.Tensor, new: KV) -> None:
    """Write ``new``, n rows of the pool's dtype, to the rows ``out_cache_loc`` (int32 [n]) of ``pool``."""
    width = pool.k[0].numel()
    _store_kv[(len(out_cache_loc),)](
        pool,
        new,
        out_cache_loc,
        new.k.stride(0),
        new.v.stride(0),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )
