"""Where the new K and V of a dynamic prefill go, and what moves once a layer is decided."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.attention.indices import Windows
from lt_sglang.attention.kernels.banks import bank_row, streaming_bank_start
from lt_sglang.attention.kernels.requests import DECIDED, STAGE, Requests
from lt_sglang.attention.kernels.tiles import Tiles
from lt_sglang.memory.banks import BankLayout


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
