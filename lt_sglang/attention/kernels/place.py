"""Where the new K and V of a dynamic prefill go, and what moves once a layer has its place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.attention.kernels.banks import LayerBanks, bank_row, streaming_bank_start
from lt_sglang.attention.kernels.requests import KNOWN, STAGED, Requests
from lt_sglang.attention.kernels.tiles import Tiles
from lt_sglang.memory.kv import KV


@triton.jit(do_not_specialize=["layer"])
def _place(  # type: ignore[no-untyped-def]
    pool,
    new,
    k_stride,
    v_stride,
    tile_ptr,
    given,
    banks,
    popped_ptr,
    layer,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    SINK: tl.constexpr,
    SETTLE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    request = tl.load(tile_ptr + tl.program_id(0) * 3)
    position = tl.load(tile_ptr + tl.program_id(0) * 3 + 1) + tl.arange(0, BLOCK_P)
    in_tile = tl.arange(0, BLOCK_P) < tl.load(tile_ptr + tl.program_id(0) * 3 + 2)
    width = tl.arange(0, BLOCK)
    mask = in_tile[:, None] & (width < WIDTH)[None, :]
    kind = tl.load(given.kind + request)
    prefix = tl.load(given.prefix + request)
    offset = tl.load(given.offset + request)
    full = tl.load(given.full + offset + position, mask=in_tile, other=0)
    streaming = tl.load(given.streaming + offset + position, mask=in_tile, other=0)
    is_new = position >= prefix
    token = tl.load(given.token + request) + position - prefix
    fresh = mask & is_new[:, None]
    at = token[:, None].to(tl.int64)
    k = tl.load(new.k + at * k_stride + width[None, :], mask=fresh, other=0)
    v = tl.load(new.v + at * v_stride + width[None, :], mask=fresh, other=0)
    if kind == KNOWN:
        of = banks.bank_of + tl.load(given.layer_set + request).to(tl.int64) * LAYERS
        row = bank_row(banks, tl.load(of + layer), full, streaming, FULL_BANKS).to(tl.int64)
        tl.store(pool.k + row[:, None] * WIDTH + width[None, :], k, mask=mask)
        tl.store(pool.v + row[:, None] * WIDTH + width[None, :], v, mask=mask)
    elif layer < FULL_BANKS:
        row_early = (layer * banks.full_rows + full).to(tl.int64)
        tl.store(pool.k + row_early[:, None] * WIDTH + width[None, :], k, mask=mask)
        tl.store(pool.v + row_early[:, None] * WIDTH + width[None, :], v, mask=mask)
    else:
        if SETTLE:
            first_staged = banks.staging_start + (layer - FULL_BANKS) * banks.staging_rows
            at_staged = (first_staged + position).to(tl.int64)[:, None] * WIDTH + width[None, :]
            if kind == STAGED:
                tl.store(pool.k + at_staged, k, mask=mask)
                tl.store(pool.v + at_staged, v, mask=mask)
            else:
                old = mask & (position < prefix)[:, None]
                whole_k = tl.where(is_new[:, None], k, tl.load(pool.k + at_staged, mask=old, other=0))
                whole_v = tl.where(is_new[:, None], v, tl.load(pool.v + at_staged, mask=old, other=0))
                popped = tl.load(popped_ptr + tl.load(given.selecting + request))
                of = banks.bank_of + tl.load(given.layer_set + request).to(tl.int64) * LAYERS
                taken = tl.load(of + layer)
                at_full = (taken * banks.full_rows + full).to(tl.int64)[:, None] * WIDTH + width[None, :]
                moved = mask & (popped != layer)
                cut_k = tl.where(popped == layer, whole_k, tl.load(pool.k + at_full, mask=moved, other=0))
                cut_v = tl.where(popped == layer, whole_v, tl.load(pool.v + at_full, mask=moved, other=0))
                # The popped layer takes the streaming bank that has this layer's number.
                start = streaming_bank_start(banks, layer, FULL_BANKS)
                held = mask & (streaming != 0)[:, None]
                at_held = (start + streaming).to(tl.int64)[:, None] * WIDTH + width[None, :]
                tl.store(pool.k + at_held, cut_k, mask=held)
                tl.store(pool.v + at_held, cut_v, mask=held)
                sink_set = tl.load(given.sink_set + request)
                sinks = mask & ((position < SINK) & (sink_set >= 0))[:, None]
                stored = (start + banks.sink_base + sink_set * SINK + position).to(tl.int64)
                at_sinks = stored[:, None] * WIDTH + width[None, :]
                tl.store(pool.k + at_sinks, cut_k, mask=sinks)
                tl.store(pool.v + at_sinks, cut_v, mask=sinks)
                tl.store(pool.k + at_full, whole_k, mask=moved)
                tl.store(pool.v + at_full, whole_v, mask=moved)
        else:
            row_scratch = (banks.scratch_start + token).to(tl.int64)
            tl.store(pool.k + row_scratch[:, None] * WIDTH + width[None, :], k, mask=mask)
            tl.store(pool.v + row_scratch[:, None] * WIDTH + width[None, :], v, mask=mask)


def tile_positions(width: int) -> int:
    """Positions of a tile of these kernels for K and V rows of ``width`` elements."""
    return max(1, min(16, 8192 // int(triton.next_power_of_2(width))))


def store_new(pool: KV, new: KV, layer: int, tiles: Tiles, given: Requests, banks: LayerBanks) -> None:
    """Put new K and V of a prefill where ``layer`` reads them while it attends.

    Those of known requests go to their banks, of others to the full bank of a layer before P, else to the
    scratch rows; see attention/dynamic_torch.py.

    Args:
        pool: the flat pool.
        new: [tokens, KV heads, dim] of the batch, in the pool's dtype.
        layer: index of the layer.
        tiles: of the new tokens.
        given: the requests of the batch.
        banks: where the layers of the requests are.
    """
    _run(pool, new, layer, tiles, given, banks)


def settle(
    pool: KV, new: KV, layer: int, tiles: Tiles, given: Requests, banks: LayerBanks, popped: torch.Tensor
) -> None:
    """Once a layer from P on has its place: stage, or cut the popped layer and fill the bank that is free.

    New K and V of known requests, if there are tiles of theirs, go to their banks.

    Args:
        pool: the flat pool.
        new: [tokens, KV heads, dim] of the batch, in the pool's dtype.
        layer: index of the layer.
        tiles: of all positions of selecting requests, or of the new tokens of others.
        given: the requests of the batch.
        banks: where the layers of the requests are.
        popped: int32 [D], from ``queue_step``.
    """
    _run(pool, new, layer, tiles, given, banks, popped)


def _run(
    pool: KV,
    new: KV,
    layer: int,
    tiles: Tiles,
    given: Requests,
    banks: LayerBanks,
    popped: torch.Tensor | None = None,
) -> None:
    if tiles.number == 0:
        return
    width = pool.k[0].numel()
    _place[(tiles.number,)](
        pool,
        new,
        new.k.stride(0),
        new.v.stride(0),
        tiles.table,
        given=given,
        banks=banks.args,
        popped_ptr=given.kind if popped is None else popped,
        layer=layer,
        LAYERS=banks.layout.layers,
        FULL_BANKS=banks.layout.full_banks,
        SINK=banks.windows.sink_tokens,
        SETTLE=popped is not None,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        BLOCK_P=tile_positions(width),
        num_warps=8,
    )
