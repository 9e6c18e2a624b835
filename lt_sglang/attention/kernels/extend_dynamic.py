"""Index lists of attention over cached tokens in a dynamic prefill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lt_sglang.attention.kernels.banks import LayerBanks, bank_row
from lt_sglang.attention.kernels.requests import KNOWN, Requests
from lt_sglang.attention.kernels.tiles import Tiles, make_tiles

LIST_BLOCK = 1024


@triton.jit(do_not_specialize=["requests"])
def _extend_kv_indptr(  # type: ignore[no-untyped-def]
    out_ptr,
    lengths_ptr,
    given,
    banks,
    requests,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    LAZY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    item = tl.arange(0, BLOCK)
    valid = item < requests
    kind = tl.load(given.kind + item, mask=valid, other=0)
    table = tl.load(given.layer_set + item, mask=valid, other=0).to(tl.int64) * LAYERS
    length = tl.load(lengths_ptr + item, mask=valid, other=0)
    before = tl.zeros([BLOCK], tl.int32)
    count = length
    for current in range(0, layer + 1):
        before += tl.where(current > 0, count, 0)
        bank = tl.load(banks.bank_of + table + current, mask=valid, other=0)
        lazy = (kind == KNOWN) & (bank >= FULL_BANKS)
        count = tl.where(lazy == LAZY, length, 0)
    start = tl.sum(tl.where(valid, before, 0))
    ends = start + tl.cumsum(tl.where(valid, count, 0))
    tl.store(out_ptr + layer * requests + item + 1, ends, mask=valid)
    tl.store(out_ptr, 0, mask=layer == 0)


def extend_kv_indptr(
    banks: LayerBanks, given: Requests, lengths: torch.Tensor, *, lazy: bool
) -> torch.Tensor:
    """int32 [L * bs + 1]: where each layer's list of each request begins, as ``decode_kv_indptr``.

    Args:
        banks: where the layers of the requests are.
        given: the requests of the batch.
        lengths: int32 [bs], a list's length where it is not empty.
        lazy: lists of lazy layers, else of those with full attention (undecided requests have no others).
    """
    layers, requests = banks.layout.layers, len(lengths)
    out = torch.empty(layers * requests + 1, dtype=torch.int32, device=lengths.device)
    _extend_kv_indptr[(layers,)](
        out,
        lengths,
        given,
        banks.args,
        requests,
        LAYERS=layers,
        FULL_BANKS=banks.layout.full_banks,
        LAZY=lazy,
        BLOCK=triton.next_power_of_2(max(requests, 16)),
    )
    return out


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    tile_ptr, given, banks, LAYERS: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile: its request, positions, and which of them exist; whether the layers of the request are known.

    Then where its row of the layer table begins, and its full and streaming slots.
    """
    request = tl.load(tile_ptr + tl.program_id(0) * 3)
    position0 = tl.load(tile_ptr + tl.program_id(0) * 3 + 1)
    count = tl.load(tile_ptr + tl.program_id(0) * 3 + 2)
    item = tl.arange(0, BLOCK)
    valid = item < count
    position = position0 + item
    known = tl.load(given.kind + request) == KNOWN
    of = banks.bank_of + tl.load(given.layer_set + request).to(tl.int64) * LAYERS
    offset = tl.load(given.offset + request)
    full = tl.load(given.full + offset + position, mask=valid, other=0)
    streaming = tl.load(given.streaming + offset + position, mask=valid, other=0)
    return request, position, valid, known, of, full, streaming


@triton.jit(do_not_specialize=["requests"])
def _extend_kv_indices(  # type: ignore[no-untyped-def]
    out_ptr,
    kv_indptr_ptr,
    tile_ptr,
    first_ptr,
    given,
    banks,
    requests,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    LAZY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request, position, valid, known, of, full, streaming = _tile(tile_ptr, given, banks, LAYERS, BLOCK)
    element = position - tl.load(first_ptr + request)
    for layer in range(0, LAYERS):
        bank = layer
        if known:
            bank = tl.load(of + layer)
        if (known & (bank >= FULL_BANKS)) == LAZY:
            row = bank_row(banks, bank, full, streaming, valid, FULL_BANKS, LANES, PARTS)
            start = tl.load(kv_indptr_ptr + layer * requests + request).to(tl.int64)
            tl.store(out_ptr + start + element, row, mask=valid)


def extend_kv_indices(
    banks: LayerBanks,
    given: Requests,
    firsts: list[int],
    ends: list[int],
    kv_indptr: torch.Tensor,
    *,
    lazy: bool,
) -> torch.Tensor:
    """The rows that some layers read in a prefill; int32 [at least kv_indptr[-1]].

    Args:
        banks: where the layers of the requests are.
        given: the requests of the batch.
        firsts: the first position that each request's lists cover, where they are not empty.
        ends: one behind the last such position.
        kv_indptr: from ``extend_kv_indptr`` with the same ``lazy``.
        lazy: lists of lazy layers, else of those with full attention.
    """
    layout, device = banks.layout, kv_indptr.device
    size = (sum(ends) - sum(firsts)) * layout.layers
    out = torch.empty(max(size, 1), dtype=torch.int32, device=device)
    tiles = _tiles(firsts, ends, device)
    if tiles.number:
        first = torch.tensor(firsts, dtype=torch.int32).to(device, non_blocking=True)
        _extend_kv_indices[(tiles.number,)](
            out,
            kv_indptr,
            tiles.table,
            first,
            given,
            banks.args,
            len(firsts),
            **banks.constants,
            LAZY=lazy,
            BLOCK=LIST_BLOCK,
        )
    return out


@triton.jit(do_not_specialize=["layer_stride"])
def _every_kv_indices(  # type: ignore[no-untyped-def]
    out_ptr,
    layer_stride,
    tile_ptr,
    shift_ptr,
    given,
    banks,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request, position, valid, known, of, full, streaming = _tile(tile_ptr, given, banks, LAYERS, BLOCK)
    # Sinks that left the window of a prefix no longer than sink + recent; others' lists are not read.
    left = valid & known & (position < SINK) & (position < tl.load(given.prefix + request) - RECENT)
    stored = tl.load(given.sinks + request * SINK + position, mask=left, other=-1)
    streaming = tl.where(stored >= 0, stored, streaming)
    out = out_ptr + tl.load(shift_ptr + request) + position
    for layer in range(0, LAYERS):
        bank = layer
        if known:
            bank = tl.load(of + layer)
        row = bank_row(banks, bank, full, streaming, valid, FULL_BANKS, LANES, PARTS)
        tl.store(out, row, mask=valid)
        out += layer_stride


def every_kv_indices(banks: LayerBanks, given: Requests, firsts: list[int], ends: list[int]) -> torch.Tensor:
    """The rows of positions ``firsts`` to ``ends`` in every layer; int32 [L, sum of lengths].

    A lazy layer's rows are right within the window before the prefix's end, and all if the prefix is no
    longer than sink + recent.
    """
    layout, device = banks.layout, given.kind.device
    total = sum(ends) - sum(firsts)
    out = torch.empty((layout.layers, total), dtype=torch.int32, device=device)
    tiles = _tiles(firsts, ends, device)
    if tiles.number:
        shifts, at = [], 0
        for first, end in zip(firsts, ends, strict=True):
            shifts.append(at - first)
            at += end - first
        _every_kv_indices[(tiles.number,)](
            out,
            total,
            tiles.table,
            torch.tensor(shifts, dtype=torch.int32).to(device, non_blocking=True),
            given,
            banks.args,
            **banks.constants,
            SINK=banks.windows.sink_tokens,
            RECENT=banks.windows.recent_tokens,
            BLOCK=LIST_BLOCK,
        )
    return out


def _tiles(firsts: Sequence[int], ends: Sequence[int], device: torch.device) -> Tiles:
    runs = [(request, first, end) for request, (first, end) in enumerate(zip(firsts, ends, strict=True))]
    return make_tiles(runs, LIST_BLOCK, device)
