"""Index lists of a dynamic decode step.

attention/dynamic_torch.py says the same in plain torch.

Only tables tell which layer of which request is lazy, so nothing here waits for the device, and one launch
serves all layers of a step. Rows are int32 indices into the flat pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.attention.indices import StreamingTables
from lt_sglang.attention.kernels.banks import LayerBanks, bank_row, lane_row

BLOCK = 1024


@triton.jit(do_not_specialize=["requests"])
def _decode_kv_indptr(  # type: ignore[no-untyped-def]
    out_ptr,
    req_pool_indices_ptr,
    seq_lens_ptr,
    banks,
    requests,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    LAZY_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    item = tl.arange(0, BLOCK)
    valid = item < requests
    row = tl.load(req_pool_indices_ptr + item, mask=valid, other=0).to(tl.int64)
    length = tl.load(seq_lens_ptr + item, mask=valid, other=0).to(tl.int32)
    table = tl.load(banks.set_of + row, mask=valid, other=0).to(tl.int64) * LAYERS
    short = tl.minimum(length, LAZY_TOKENS)
    before = tl.zeros([BLOCK], tl.int32)
    for earlier in range(0, layer):
        bank = tl.load(banks.bank_of + table + earlier, mask=valid, other=0)
        before += tl.where(bank < FULL_BANKS, length, short)
    bank = tl.load(banks.bank_of + table + layer, mask=valid, other=0)
    count = tl.where(bank < FULL_BANKS, length, short)
    start = tl.sum(tl.where(valid, before, 0))
    ends = start + tl.cumsum(tl.where(valid, count, 0))
    tl.store(out_ptr + layer * requests + item + 1, ends, mask=valid)
    tl.store(out_ptr, 0, mask=layer == 0)


def decode_kv_indptr(
    out: torch.Tensor, banks: LayerBanks, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor
) -> None:
    """Where each layer's list of each request begins: sums of min(length, w_sink + w_recent) or the length.

    Args:
        out: int32 [L * bs + 1]; ``out[l * bs : (l + 1) * bs + 1]`` is the kv_indptr of layer l.
        banks: where the layers of the requests are.
        req_pool_indices: int [bs].
        seq_lens: int [bs].
    """
    layers, requests = banks.layout.layers, len(req_pool_indices)
    _decode_kv_indptr[(layers,)](
        out,
        req_pool_indices,
        seq_lens,
        banks.args,
        requests,
        LAYERS=layers,
        FULL_BANKS=banks.layout.full_banks,
        LAZY_TOKENS=banks.windows.lazy_tokens,
        BLOCK=triton.next_power_of_2(max(requests, 16)),
    )


@triton.jit(do_not_specialize=["requests", "full_blocks"])
def _decode_kv_indices(  # type: ignore[no-untyped-def]
    out_ptr,
    kv_indptr_ptr,
    req_pool_indices_ptr,
    seq_lens_ptr,
    tables,
    context,
    banks,
    requests,
    full_blocks,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.load(req_pool_indices_ptr + request).to(tl.int64)
    length = tl.load(seq_lens_ptr + request).to(tl.int32)
    of = banks.bank_of + tl.load(banks.set_of + row).to(tl.int64) * LAYERS
    tokens = tables.req_to_token + row * context
    if block < full_blocks:
        item = block * BLOCK + tl.arange(0, BLOCK)
        valid = item < length
        if block * BLOCK < length:
            slot = tl.load(tokens + item, mask=valid, other=0).to(tl.int32)
            for layer in range(0, LAYERS):
                bank = tl.load(of + layer)
                if bank < FULL_BANKS:
                    start = tl.load(kv_indptr_ptr + layer * requests + request).to(tl.int64)
                    full_row = lane_row(banks, bank, slot, valid, FULL_BANKS, LANES, PARTS)
                    tl.store(out_ptr + start + item, full_row, mask=valid)
    else:
        item = (block - full_blocks) * BLOCK + tl.arange(0, BLOCK)
        valid = item < tl.minimum(length, SINK + RECENT)
        first = tl.maximum(length - RECENT, 0)
        sinks = tl.minimum(first, SINK)
        is_sink = item < sinks
        position = tl.where(is_sink, item, first + item - sinks)
        full = tl.load(tokens + position, mask=valid, other=0)
        slot = tl.load(tables.full_to_streaming + full.to(tl.int64), mask=valid, other=0).to(tl.int32)
        sink_set = tl.load(tables.sink_set_of + row).to(tl.int32)
        is_stored = valid & is_sink & (sink_set >= 0)
        stored = tl.load(tables.sink_slots_of + sink_set * SINK + item, mask=is_stored, other=0)
        slot = tl.where(is_stored, stored, slot)
        for layer in range(0, LAYERS):
            bank = tl.load(of + layer)
            if bank >= FULL_BANKS:
                start = tl.load(kv_indptr_ptr + layer * requests + request).to(tl.int64)
                lazy_row = lane_row(banks, bank, slot, valid, FULL_BANKS, LANES, PARTS)
                tl.store(out_ptr + start + item, lazy_row, mask=valid)


def decode_kv_indices(
    out: torch.Tensor,
    kv_indptr: torch.Tensor,
    banks: LayerBanks,
    tables: StreamingTables,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    longest: int,
) -> None:
    """Write the rows that every layer of every request reads in a decode step.

    Args:
        out: int32, at least kv_indptr[-1] elements.
        kv_indptr: from ``decode_kv_indptr``.
        banks: where the layers of the requests are.
        tables: where positions live.
        req_pool_indices: int [bs].
        seq_lens: int [bs].
        longest: at least the longest of ``seq_lens``; host value that sizes the grid.
    """
    requests, full_blocks = len(req_pool_indices), triton.cdiv(max(longest, 1), BLOCK)
    _decode_kv_indices[(requests, full_blocks + triton.cdiv(banks.windows.lazy_tokens, BLOCK))](
        out,
        kv_indptr,
        req_pool_indices,
        seq_lens,
        tables,
        context=tables.req_to_token.stride(0),
        banks=banks.args,
        requests=requests,
        full_blocks=full_blocks,
        **banks.constants,
        SINK=banks.windows.sink_tokens,
        RECENT=banks.windows.recent_tokens,
        BLOCK=BLOCK,
    )


@triton.jit(do_not_specialize=["requests", "given"])
def _decode_out_cache_loc(  # type: ignore[no-untyped-def]
    out_ptr,
    out_stride,
    req_pool_indices_ptr,
    full_ptr,
    streaming_ptr,
    banks,
    requests,
    given,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    item = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = item < requests
    request_row = tl.load(req_pool_indices_ptr + item, mask=valid, other=0).to(tl.int64)
    table = tl.load(banks.set_of + request_row, mask=valid, other=0).to(tl.int64) * LAYERS
    bank = tl.load(banks.bank_of + table + layer, mask=valid, other=0)
    full = tl.load(full_ptr + item, mask=item < given, other=0).to(tl.int32)
    streaming = tl.load(streaming_ptr + item, mask=item < given, other=0).to(tl.int32)
    row = bank_row(banks, bank, full, streaming, valid, FULL_BANKS, LANES, PARTS)
    tl.store(out_ptr + layer * out_stride + item, row, mask=valid)


def decode_out_cache_loc(
    out: torch.Tensor,
    banks: LayerBanks,
    req_pool_indices: torch.Tensor,
    full_slots: torch.Tensor,
    streaming_slots: torch.Tensor,
) -> None:
    """Where a decode step writes its new K and V, by layer.

    Args:
        out: int32 [L, at least bs].
        banks: where the layers of the requests are.
        req_pool_indices: int [bs].
        full_slots: int [at most bs]. Requests beyond are padding; they write the padding rows of their banks.
        streaming_slots: int [as many or more].
    """
    layers, requests, block = banks.layout.layers, len(req_pool_indices), 128
    given = len(full_slots)
    assert given <= min(requests, len(streaming_slots))
    _decode_out_cache_loc[(layers, triton.cdiv(requests, block))](
        out,
        out.stride(0),
        req_pool_indices,
        full_slots,
        streaming_slots,
        banks.args,
        requests,
        given,
        **banks.constants,
        BLOCK=block,
    )
