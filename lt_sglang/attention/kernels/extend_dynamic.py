"""Index lists of attention over cached tokens in a dynamic prefill."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.attention.indices import Windows
from lt_sglang.attention.kernels.banks import bank_row
from lt_sglang.attention.kernels.requests import DECIDED, Requests
from lt_sglang.attention.kernels.tiles import make_tiles
from lt_sglang.memory.banks import BankLayout

LIST_BLOCK = 1024


@triton.jit(do_not_specialize=["requests"])
def _list_pointers(  # type: ignore[no-untyped-def]
    out_ptr,
    bank_of_ptr,
    kind_ptr,
    layer_set_ptr,
    lengths_ptr,
    requests,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    WHICH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    item = tl.arange(0, BLOCK)
    valid = item < requests
    kind = tl.load(kind_ptr + item, mask=valid, other=0)
    table = tl.load(layer_set_ptr + item, mask=valid, other=0).to(tl.int64) * LAYERS
    length = tl.load(lengths_ptr + item, mask=valid, other=0)
    before = tl.zeros([BLOCK], tl.int32)
    count = length
    for current in range(0, layer + 1):
        before += tl.where(current > 0, count, 0)
        if WHICH != 2:
            bank = tl.load(bank_of_ptr + table + current, mask=valid, other=0)
            full = (kind != DECIDED) | (bank < FULL_BANKS)
            count = tl.where(full == (WHICH == 0), length, 0)
    start = tl.sum(tl.where(valid, before, 0))
    ends = start + tl.cumsum(tl.where(valid, count, 0))
    tl.store(out_ptr + layer * requests + item + 1, ends, mask=valid)
    tl.store(out_ptr, 0, mask=layer == 0)


FULL_ONLY, LAZY_ONLY, EVERY = 0, 1, 2


def list_pointers(
    bank_of: torch.Tensor, given: Requests, lengths: torch.Tensor, full_banks: int, which: int
) -> torch.Tensor:
    """int32 [L * bs + 1]: where each layer's list of each request begins, as ``kernels.decode_pointers``.

    lengths: int32 [bs], a list's length where it is not empty. which: FULL_ONLY: layers with full attention
    (undecided requests have no others); LAZY_ONLY: lazy layers; EVERY: all.
    """
    layers, requests = bank_of.shape[1], len(lengths)
    out = torch.empty(layers * requests + 1, dtype=torch.int32, device=lengths.device)
    _list_pointers[(layers,)](
        out,
        bank_of,
        given.kind,
        given.layer_set,
        lengths,
        requests,
        LAYERS=layers,
        FULL_BANKS=full_banks,
        WHICH=which,
        BLOCK=triton.next_power_of_2(max(requests, 16)),
    )
    return out


@triton.jit(do_not_specialize=["requests"])
def _extend_lists(  # type: ignore[no-untyped-def]
    out_ptr,
    pointer_ptr,
    tile_ptr,
    bank_of_ptr,
    kind_ptr,
    layer_set_ptr,
    prefix_ptr,
    token_ptr,
    offset_ptr,
    sink_set_ptr,
    first_ptr,
    full_ptr,
    streaming_ptr,
    requests,
    full_rows,
    streaming_start,
    streaming_rows,
    staging_start,
    staging_rows,
    scratch_start,
    sink_base,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    WHICH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.load(tile_ptr + tl.program_id(0) * 3)
    position0 = tl.load(tile_ptr + tl.program_id(0) * 3 + 1)
    count = tl.load(tile_ptr + tl.program_id(0) * 3 + 2)
    item = tl.arange(0, BLOCK)
    valid = item < count
    position = position0 + item
    kind = tl.load(kind_ptr + request)
    banks = bank_of_ptr + tl.load(layer_set_ptr + request).to(tl.int64) * LAYERS
    prefix = tl.load(prefix_ptr + request)
    offset = tl.load(offset_ptr + request)
    full = tl.load(full_ptr + offset + position, mask=valid, other=0)
    streaming = tl.load(streaming_ptr + offset + position, mask=valid, other=0)
    if WHICH == 2:
        # Sinks that left the window of a prefix no longer than sink + recent; others' lists are not read.
        sink_set = tl.load(sink_set_ptr + request)
        stored = (position < SINK) & (position < prefix - RECENT) & (sink_set >= 0)
        streaming = tl.where(stored, sink_base + sink_set * SINK + position, streaming)
    waiting = scratch_start + tl.load(token_ptr + request) + position - prefix
    element = position - tl.load(first_ptr + request)
    for layer in range(0, LAYERS):
        bank = layer
        if kind == DECIDED:
            bank = tl.load(banks + layer)
        row = bank_row(bank, full, streaming, FULL_BANKS, full_rows, streaming_start, streaming_rows)
        if (kind != DECIDED) & (layer >= FULL_BANKS):
            staged = staging_start + (layer - FULL_BANKS) * staging_rows + position
            row = tl.where(position < prefix, staged, waiting)
        is_full = (kind != DECIDED) | (bank < FULL_BANKS)
        if (WHICH == 2) | (is_full == (WHICH == 0)):
            start = tl.load(pointer_ptr + layer * requests + request).to(tl.int64)
            tl.store(out_ptr + start + element, row, mask=valid)


def extend_lists(
    size: int,
    pointers: torch.Tensor,
    firsts: list[int],
    ends: list[int],
    given: Requests,
    bank_of: torch.Tensor,
    windows: Windows,
    layout: BankLayout,
    which: int,
) -> torch.Tensor:
    """The rows that every layer reads in a prefill; int32 [size].

    Args:
        size: at least pointers[-1]; known on the host.
        pointers: from ``list_pointers`` with the same ``which``.
        firsts, ends: positions that each request's lists cover. With EVERY, a lazy layer's rows are right
            within the window before the prefix's end, and all if the prefix is no longer than sink + recent.
    """
    device = pointers.device
    out = torch.empty(max(size, 1), dtype=torch.int32, device=device)
    runs = [(request, first, end) for request, (first, end) in enumerate(zip(firsts, ends, strict=True))]
    tiles = make_tiles(runs, LIST_BLOCK, device)
    if tiles.number == 0:
        return out
    first = torch.tensor(firsts, dtype=torch.int32).to(device, non_blocking=True)
    _extend_lists[(tiles.number,)](
        out,
        pointers,
        tiles.table,
        bank_of,
        given.kind,
        given.layer_set,
        given.prefix,
        given.token,
        given.offset,
        given.sink_set,
        first,
        given.full,
        given.streaming,
        len(firsts),
        layout.full_rows,
        layout.streaming_start,
        layout.streaming_rows,
        layout.staging_start,
        layout.staging_rows,
        layout.scratch_start,
        windows.sink_base,
        LAYERS=layout.layers,
        FULL_BANKS=layout.full_banks,
        SINK=windows.sink_tokens,
        RECENT=windows.recent_tokens,
        WHICH=which,
        BLOCK=LIST_BLOCK,
    )
    return out
