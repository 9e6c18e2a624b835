"""Index lists of a dynamic decode step.

attention/dynamic_torch.py says the same in plain torch.

Only tables tell which layer of which request is lazy, so nothing here waits for the device, and one launch
serves all layers of a step. Rows are int32 indices into the flat tensors of the arena.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.attention.indices import StreamingTables, Windows
from lt_sglang.attention.kernels.banks import bank_row, streaming_bank_start
from lt_sglang.memory.banks import BankLayout


@triton.jit(do_not_specialize=["requests"])
def _decode_pointers(  # type: ignore[no-untyped-def]
    out_ptr,
    bank_of_ptr,
    set_of_ptr,
    rows_ptr,
    seq_lens_ptr,
    requests,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    LAZY_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    item = tl.arange(0, BLOCK)
    valid = item < requests
    row = tl.load(rows_ptr + item, mask=valid, other=0).to(tl.int64)
    length = tl.load(seq_lens_ptr + item, mask=valid, other=0).to(tl.int32)
    table = tl.load(set_of_ptr + row, mask=valid, other=0).to(tl.int64) * LAYERS
    short = tl.minimum(length, LAZY_TOKENS)
    before = tl.zeros([BLOCK], tl.int32)
    for earlier in range(0, layer):
        bank = tl.load(bank_of_ptr + table + earlier, mask=valid, other=0)
        before += tl.where(bank < FULL_BANKS, length, short)
    bank = tl.load(bank_of_ptr + table + layer, mask=valid, other=0)
    count = tl.where(bank < FULL_BANKS, length, short)
    start = tl.sum(tl.where(valid, before, 0))
    ends = start + tl.cumsum(tl.where(valid, count, 0))
    tl.store(out_ptr + layer * requests + item + 1, ends, mask=valid)
    tl.store(out_ptr, 0, mask=layer == 0)


def decode_pointers(
    out: torch.Tensor,
    bank_of: torch.Tensor,
    set_of: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    full_banks: int,
    windows: Windows,
) -> None:
    """Where each layer's list of each request begins: sums of min(length, w_sink + w_recent) or the length.

    out: int32 [L * bs + 1]; ``out[l * bs : (l + 1) * bs + 1]`` is the indptr of layer l.
    """
    layers = bank_of.shape[1]
    _decode_pointers[(layers,)](
        out,
        bank_of,
        set_of,
        rows,
        seq_lens,
        len(rows),
        LAYERS=layers,
        FULL_BANKS=full_banks,
        LAZY_TOKENS=windows.lazy_tokens,
        BLOCK=triton.next_power_of_2(max(len(rows), 16)),
    )


@triton.jit(do_not_specialize=["requests", "full_blocks"])
def _decode_lists(  # type: ignore[no-untyped-def]
    out_ptr,
    pointer_ptr,
    bank_of_ptr,
    set_of_ptr,
    rows_ptr,
    seq_lens_ptr,
    req_to_token_ptr,
    req_to_token_stride,
    full_to_streaming_ptr,
    row_of_ptr,
    requests,
    full_blocks,
    full_rows,
    streaming_start,
    streaming_rows,
    sink_base,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.load(rows_ptr + request).to(tl.int64)
    length = tl.load(seq_lens_ptr + request).to(tl.int32)
    banks = bank_of_ptr + tl.load(set_of_ptr + row).to(tl.int64) * LAYERS
    tokens = req_to_token_ptr + row * req_to_token_stride
    if block < full_blocks:
        item = block * BLOCK + tl.arange(0, BLOCK)
        valid = item < length
        if block * BLOCK < length:
            slot = tl.load(tokens + item, mask=valid, other=0).to(tl.int32)
            for layer in range(0, LAYERS):
                bank = tl.load(banks + layer)
                if bank < FULL_BANKS:
                    start = tl.load(pointer_ptr + layer * requests + request).to(tl.int64)
                    tl.store(out_ptr + start + item, slot + bank * full_rows, mask=valid)
    else:
        item = (block - full_blocks) * BLOCK + tl.arange(0, BLOCK)
        valid = item < tl.minimum(length, SINK + RECENT)
        first = tl.maximum(length - RECENT, 0)
        sinks = tl.minimum(first, SINK)
        is_sink = item < sinks
        position = tl.where(is_sink, item, first + item - sinks)
        full = tl.load(tokens + position, mask=valid, other=0)
        slot = tl.load(full_to_streaming_ptr + full.to(tl.int64), mask=valid, other=0).to(tl.int32)
        sink_set = tl.load(row_of_ptr + row).to(tl.int32)
        slot = tl.where(is_sink & (sink_set >= 0), sink_base + sink_set * SINK + item, slot)
        for layer in range(0, LAYERS):
            bank = tl.load(banks + layer)
            if bank >= FULL_BANKS:
                start = tl.load(pointer_ptr + layer * requests + request).to(tl.int64)
                base = streaming_bank_start(bank, FULL_BANKS, streaming_start, streaming_rows)
                tl.store(out_ptr + start + item, slot + base, mask=valid)


def decode_lists(
    out: torch.Tensor,
    pointers: torch.Tensor,
    bank_of: torch.Tensor,
    set_of: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    longest: int,
    tables: StreamingTables,
    windows: Windows,
    layout: BankLayout,
) -> None:
    """Write the rows that every layer of every request reads in a decode step.

    Args:
        out: int32, at least pointers[-1] elements.
        pointers: from ``decode_pointers``.
        longest: at least the longest of ``seq_lens``; host value that sizes the grid.
    """
    block = 1024
    full_blocks = triton.cdiv(max(longest, 1), block)
    grid = (len(rows), full_blocks + triton.cdiv(windows.lazy_tokens, block))
    _decode_lists[grid](
        out,
        pointers,
        bank_of,
        set_of,
        rows,
        seq_lens,
        tables.req_to_token,
        tables.req_to_token.stride(0),
        tables.full_to_streaming,
        tables.row_of,
        len(rows),
        full_blocks,
        layout.full_rows,
        layout.streaming_start,
        layout.streaming_rows,
        windows.sink_base,
        LAYERS=layout.layers,
        FULL_BANKS=layout.full_banks,
        SINK=windows.sink_tokens,
        RECENT=windows.recent_tokens,
        BLOCK=block,
    )


@triton.jit(do_not_specialize=["requests"])
def _write_rows(  # type: ignore[no-untyped-def]
    out_ptr,
    out_stride,
    bank_of_ptr,
    set_of_ptr,
    rows_ptr,
    full_ptr,
    streaming_ptr,
    requests,
    full_rows,
    streaming_start,
    streaming_rows,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    item = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = item < requests
    request_row = tl.load(rows_ptr + item, mask=valid, other=0).to(tl.int64)
    table = tl.load(set_of_ptr + request_row, mask=valid, other=0).to(tl.int64) * LAYERS
    bank = tl.load(bank_of_ptr + table + layer, mask=valid, other=0)
    full = tl.load(full_ptr + item, mask=valid, other=0).to(tl.int32)
    streaming = tl.load(streaming_ptr + item, mask=valid, other=0).to(tl.int32)
    row = bank_row(bank, full, streaming, FULL_BANKS, full_rows, streaming_start, streaming_rows)
    tl.store(out_ptr + layer * out_stride + item, row, mask=valid)


def write_rows(
    out: torch.Tensor,
    bank_of: torch.Tensor,
    set_of: torch.Tensor,
    rows: torch.Tensor,
    full_slots: torch.Tensor,
    streaming_slots: torch.Tensor,
    layout: BankLayout,
) -> None:
    """Where a decode step writes its new K and V, by layer.

    out: int32 [L, at least bs]. full_slots, streaming_slots: int [bs]; 0 for padding requests, whose rows are
    then the padding rows of their banks.
    """
    block = 128
    _write_rows[(layout.layers, triton.cdiv(len(rows), block))](
        out,
        out.stride(0),
        bank_of,
        set_of,
        rows,
        full_slots,
        streaming_slots,
        len(rows),
        layout.full_rows,
        layout.streaming_start,
        layout.streaming_rows,
        LAYERS=layout.layers,
        FULL_BANKS=layout.full_banks,
        BLOCK=block,
    )
