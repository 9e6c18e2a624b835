"""The index list of a static decode step: what all lazy layers read, written once a step.

Runs under TRITON_INTERPRET=1 and needs nothing above sm80.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.attention.indices import StreamingTables, Windows


@triton.jit
def _decode_kv_indices(  # type: ignore[no-untyped-def]
    out_ptr,
    kv_indptr_ptr,
    req_pool_indices_ptr,
    seq_lens_ptr,
    tables,
    context,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.load(req_pool_indices_ptr + request).to(tl.int64)
    length = tl.load(seq_lens_ptr + request).to(tl.int32)
    sink_set = tl.load(tables.sink_set_of + row).to(tl.int64)
    start = tl.load(kv_indptr_ptr + request).to(tl.int64)
    first = tl.maximum(length - RECENT, 0)
    sinks = tl.minimum(first, SINK)
    item = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = item < tl.minimum(length, SINK + RECENT)
    is_sink = item < sinks
    position = tl.where(is_sink, item, first + item - sinks)
    full = tl.load(tables.req_to_token + row * context + position, mask=valid, other=0)
    slot = tl.load(tables.full_to_streaming + full.to(tl.int64), mask=valid, other=0)
    is_stored = valid & is_sink & (sink_set >= 0)
    stored = tl.load(tables.sink_slots_of + sink_set * SINK + item, mask=is_stored, other=0)
    slot = tl.where(is_stored, stored.to(tl.int64), slot)
    tl.store(out_ptr + start + item, slot.to(tl.int32), mask=valid)


def decode_kv_indices(
    out: torch.Tensor,
    kv_indptr: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    tables: StreamingTables,
    windows: Windows,
) -> None:
    """Write what ``indices.decode_kv_indices_reference`` returns into ``out``, with no host sync.

    Args:
        out: int32, at least kv_indptr[bs] elements.
        kv_indptr: int32 [bs + 1], exclusive sums of ``lazy_lengths``.
        req_pool_indices: int [bs].
        seq_lens: int [bs].
        tables: where positions live.
        windows: w_sink and w_recent.
    """
    block = min(1024, triton.next_power_of_2(windows.lazy_tokens))
    grid = (len(req_pool_indices), triton.cdiv(windows.lazy_tokens, block))
    _decode_kv_indices[grid](
        out,
        kv_indptr,
        req_pool_indices,
        seq_lens,
        tables,
        tables.req_to_token.stride(0),
        SINK=windows.sink_tokens,
        RECENT=windows.recent_tokens,
        BLOCK=block,
    )
