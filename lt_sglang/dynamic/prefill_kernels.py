"""Triton kernels of a prefill: index lists of attention over cached tokens, and where new K and V go.

A tile is a run of consecutive positions of one request. Per-request facts are int32 vectors [bs]:

    kind         prefill.Kind
    layer_set    row of the layer table
    prefix       tokens before this chunk
    token        row of the chunk's first token in the batch
    offset       first element of the request in ``full`` and ``streaming``, the slots of all its positions
    sink_set     its sink set, or -1
    deciding     index among the deciding requests, or -1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lt_sglang.attention.indices import Windows
from lt_sglang.dynamic.kernels import bank_row, streaming_bank_start
from lt_sglang.dynamic.layout import BankLayout

DECIDED: tl.constexpr = tl.constexpr(0)
DECIDE: tl.constexpr = tl.constexpr(1)
STAGE: tl.constexpr = tl.constexpr(2)
LIST_BLOCK = 1024


@dataclass(frozen=True)
class Requests:
    """The requests of a prefill batch on the device; see the module's text. All int32.

    full, streaming: [sum of lengths], slot of every position; streaming 0 where there is none.
    """

    kind: torch.Tensor
    layer_set: torch.Tensor
    prefix: torch.Tensor
    token: torch.Tensor
    offset: torch.Tensor
    sink_set: torch.Tensor
    deciding: torch.Tensor
    full: torch.Tensor
    streaming: torch.Tensor


@dataclass(frozen=True)
class Tiles:
    """int32 [number, 3]: request, first position, positions."""

    table: torch.Tensor
    number: int


def make_tiles(runs: list[tuple[int, int, int]], block: int, device: torch.device | str) -> Tiles:
    """Cut runs (request, first position, end position) into tiles of at most ``block`` positions."""
    cut = [
        (request, at, min(block, end - at)) for request, first, end in runs for at in range(first, end, block)
    ]
    table = torch.tensor(cut, dtype=torch.int32).reshape(-1, 3)
    return Tiles(table.to(device, non_blocking=True), len(cut))


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


@triton.jit(do_not_specialize=["layer"])
def _place(  # type: ignore[no-untyped-def]
    keys_ptr,
    values_ptr,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    tile_ptr,
    bank_of_ptr,
    popped_ptr,
    kind_ptr,
    layer_set_ptr,
    prefix_ptr,
    token_ptr,
    offset_ptr,
    sink_set_ptr,
    deciding_ptr,
    full_ptr,
    streaming_ptr,
    layer,
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
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCRATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    request = tl.load(tile_ptr + tl.program_id(0) * 3)
    position = tl.load(tile_ptr + tl.program_id(0) * 3 + 1) + tl.arange(0, BLOCK_P)
    in_tile = tl.arange(0, BLOCK_P) < tl.load(tile_ptr + tl.program_id(0) * 3 + 2)
    width = tl.arange(0, BLOCK)
    mask = in_tile[:, None] & (width < WIDTH)[None, :]
    kind = tl.load(kind_ptr + request)
    prefix = tl.load(prefix_ptr + request)
    offset = tl.load(offset_ptr + request)
    full = tl.load(full_ptr + offset + position, mask=in_tile, other=0)
    streaming = tl.load(streaming_ptr + offset + position, mask=in_tile, other=0)
    is_new = position >= prefix
    token = tl.load(token_ptr + request) + position - prefix
    new = mask & is_new[:, None]
    at = token[:, None].to(tl.int64)
    k = tl.load(k_ptr + at * k_stride + width[None, :], mask=new, other=0)
    v = tl.load(v_ptr + at * v_stride + width[None, :], mask=new, other=0)
    if kind == DECIDED:
        if BEFORE:
            bank = tl.load(bank_of_ptr + tl.load(layer_set_ptr + request).to(tl.int64) * LAYERS + layer)
            row = bank_row(bank, full, streaming, FULL_BANKS, full_rows, streaming_start, streaming_rows)
            row = row.to(tl.int64)
            tl.store(keys_ptr + row[:, None] * WIDTH + width[None, :], k, mask=mask)
            tl.store(values_ptr + row[:, None] * WIDTH + width[None, :], v, mask=mask)
    elif layer < FULL_BANKS:
        if BEFORE:
            row_early = (layer * full_rows + full).to(tl.int64)
            tl.store(keys_ptr + row_early[:, None] * WIDTH + width[None, :], k, mask=mask)
            tl.store(values_ptr + row_early[:, None] * WIDTH + width[None, :], v, mask=mask)
    else:
        if SCRATCH:
            row_scratch = (scratch_start + token).to(tl.int64)
            tl.store(keys_ptr + row_scratch[:, None] * WIDTH + width[None, :], k, mask=mask)
            tl.store(values_ptr + row_scratch[:, None] * WIDTH + width[None, :], v, mask=mask)
        if AFTER:
            staged = (staging_start + (layer - FULL_BANKS) * staging_rows + position).to(tl.int64)
            at_staged = staged[:, None] * WIDTH + width[None, :]
            if kind == STAGE:
                tl.store(keys_ptr + at_staged, k, mask=mask)
                tl.store(values_ptr + at_staged, v, mask=mask)
            else:
                old = mask & (position < prefix)[:, None]
                whole_k = tl.where(is_new[:, None], k, tl.load(keys_ptr + at_staged, mask=old, other=0))
                whole_v = tl.where(is_new[:, None], v, tl.load(values_ptr + at_staged, mask=old, other=0))
                popped = tl.load(popped_ptr + tl.load(deciding_ptr + request))
                taken = tl.load(bank_of_ptr + tl.load(layer_set_ptr + request).to(tl.int64) * LAYERS + layer)
                at_full = (taken * full_rows + full).to(tl.int64)[:, None] * WIDTH + width[None, :]
                moved = mask & (popped != layer)
                cut_k = tl.where(popped == layer, whole_k, tl.load(keys_ptr + at_full, mask=moved, other=0))
                cut_v = tl.where(popped == layer, whole_v, tl.load(values_ptr + at_full, mask=moved, other=0))
                # The popped layer takes the streaming bank that has this layer's number.
                start = streaming_bank_start(layer, FULL_BANKS, streaming_start, streaming_rows)
                held = mask & (streaming != 0)[:, None]
                at_held = (start + streaming).to(tl.int64)[:, None] * WIDTH + width[None, :]
                tl.store(keys_ptr + at_held, cut_k, mask=held)
                tl.store(values_ptr + at_held, cut_v, mask=held)
                sink_set = tl.load(sink_set_ptr + request)
                sinks = mask & ((position < SINK) & (sink_set >= 0))[:, None]
                stored = (start + sink_base + sink_set * SINK + position).to(tl.int64)
                at_sinks = stored[:, None] * WIDTH + width[None, :]
                tl.store(keys_ptr + at_sinks, cut_k, mask=sinks)
                tl.store(values_ptr + at_sinks, cut_v, mask=sinks)
                tl.store(keys_ptr + at_full, whole_k, mask=moved)
                tl.store(values_ptr + at_full, whole_v, mask=moved)


def tile_positions(width: int) -> int:
    """Positions of a tile of ``place`` for K and V rows of ``width`` elements."""
    return max(1, min(16, 8192 // int(triton.next_power_of_2(width))))


def place(
    keys: torch.Tensor,
    values: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    tiles: Tiles,
    popped: torch.Tensor,
    bank_of: torch.Tensor,
    given: Requests,
    windows: Windows,
    layout: BankLayout,
    *,
    before: bool,
    after: bool,
    scratch: bool,
) -> None:
    """Put the K and V of one layer of a prefill where they belong; see attention/dynamic_torch.py.

    Args:
        keys, values: the arena. k, v: [tokens, kv heads, dim] of the batch, in the arena's dtype.
        tiles: of the new tokens; with ``after``, from layer P on, of all positions of deciding requests.
        popped: int32 [D], from ``kernels.queue_step``.
        before: store what does not depend on a decision (decided requests; layers before P).
        scratch: from layer P on, put new tokens of undecided requests into the scratch rows.
        after: from layer P on, stage, or cut the popped layer and fill the bank that is free.
    """
    if tiles.number == 0:
        return
    width = keys[0].numel()
    _place[(tiles.number,)](
        keys,
        values,
        k,
        v,
        k.stride(0),
        v.stride(0),
        tiles.table,
        bank_of,
        popped,
        given.kind,
        given.layer_set,
        given.prefix,
        given.token,
        given.offset,
        given.sink_set,
        given.deciding,
        given.full,
        given.streaming,
        layer,
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
        BEFORE=before,
        AFTER=after,
        SCRATCH=scratch,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        BLOCK_P=tile_positions(width),
        num_warps=8,
    )
