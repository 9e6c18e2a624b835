"""The index list of a static decode step: what all lazy layers read, written once a step.

Runs under TRITON_INTERPRET=1 and needs nothing above sm80.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.attention.indices import StreamingTables, Windows


@triton.jit
def _decode_rows(  # type: ignore[no-untyped-def]
    out_ptr,
    indptr_ptr,
    rows_ptr,
    seq_lens_ptr,
    req_to_token_ptr,
    req_to_token_stride,
    full_to_streaming_ptr,
    row_of_ptr,
    sink_base,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request).to(tl.int64)
    length = tl.load(seq_lens_ptr + request).to(tl.int32)
    sink_set = tl.load(row_of_ptr + row).to(tl.int64)
    start = tl.load(indptr_ptr + request).to(tl.int64)
    first = tl.maximum(length - RECENT, 0)
    sinks = tl.minimum(first, SINK)
    item = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = item < tl.minimum(length, SINK + RECENT)
    is_sink = item < sinks
    position = tl.where(is_sink, item, first + item - sinks)
    full = tl.load(req_to_token_ptr + row * req_to_token_stride + position, mask=valid, other=0)
    slot = tl.load(full_to_streaming_ptr + full.to(tl.int64), mask=valid, other=0)
    stored = sink_base + sink_set * SINK + item
    slot = tl.where(is_sink & (sink_set >= 0), stored, slot)
    tl.store(out_ptr + start + item, slot.to(tl.int32), mask=valid)


def decode_rows(
    out: torch.Tensor,
    indptr: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    tables: StreamingTables,
    windows: Windows,
) -> None:
    """Write what ``indices.decode_rows_reference`` returns into ``out`` (int32), with no host sync.

    Args:
        out: int32, at least indptr[bs] elements.
        indptr: int32 [bs + 1], exclusive sums of ``lazy_lengths``.
        rows: int [bs], request rows. seq_lens: int [bs].
    """
    block = min(1024, triton.next_power_of_2(windows.lazy_tokens))
    grid = (len(rows), triton.cdiv(windows.lazy_tokens, block))
    _decode_rows[grid](
        out,
        indptr,
        rows,
        seq_lens,
        tables.req_to_token,
        tables.req_to_token.stride(0),
        tables.full_to_streaming,
        tables.row_of,
        windows.sink_base,
        SINK=windows.sink_tokens,
        RECENT=windows.recent_tokens,
        BLOCK=block,
    )
