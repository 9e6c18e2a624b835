"""Where the new K and V of a dynamic prefill go, and what moves once a layer has its place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lt_sglang.attention.kernels.banks import LayerBanks, bank_row, lane_row
from lt_sglang.attention.kernels.requests import KNOWN, Requests
from lt_sglang.attention.kernels.tiles import Tiles
from lt_sglang.memory.kv import KV


@triton.jit
def _positions(tile_ptr, given, BLOCK_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's request and positions, which of them exist, and their full and streaming slots."""
    request = tl.load(tile_ptr + tl.program_id(0) * 3)
    position = tl.load(tile_ptr + tl.program_id(0) * 3 + 1) + tl.arange(0, BLOCK_P)
    valid = tl.arange(0, BLOCK_P) < tl.load(tile_ptr + tl.program_id(0) * 3 + 2)
    at = tl.load(given.offset + request) + position
    full = tl.load(given.full + at, mask=valid, other=0)
    streaming = tl.load(given.streaming + at, mask=valid, other=0)
    return request, position, valid, full, streaming


@triton.jit(do_not_specialize=["layer"])
def _store_new(  # type: ignore[no-untyped-def]
    pool,
    new,
    k_stride,
    v_stride,
    tile_ptr,
    given,
    banks,
    layer,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    request, position, valid, full, streaming = _positions(tile_ptr, given, BLOCK_P)
    width = tl.arange(0, BLOCK)
    mask = valid[:, None] & (width < WIDTH)[None, :]
    token = (tl.load(given.token + request) + position - tl.load(given.prefix + request)).to(tl.int64)
    k = tl.load(new.k + token[:, None] * k_stride + width[None, :], mask=mask)
    v = tl.load(new.v + token[:, None] * v_stride + width[None, :], mask=mask)
    bank = layer
    if tl.load(given.kind + request) == KNOWN:
        of = banks.bank_of + tl.load(given.layer_set + request).to(tl.int64) * LAYERS
        bank = tl.load(of + layer)
    row = bank_row(banks, bank, full, streaming, valid, FULL_BANKS, LANES, PARTS).to(tl.int64)
    tl.store(pool.k + row[:, None] * WIDTH + width[None, :], k, mask=mask)
    tl.store(pool.v + row[:, None] * WIDTH + width[None, :], v, mask=mask)


@triton.jit(do_not_specialize=["layer"])
def _exchange(  # type: ignore[no-untyped-def]
    pool,
    tile_ptr,
    given,
    banks,
    popped_ptr,
    layer,
    LAYERS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    request, _position, valid, full, streaming = _positions(tile_ptr, given, BLOCK_P)
    popped = tl.load(popped_ptr + tl.load(given.selecting + request))
    if popped != layer:
        width = tl.arange(0, BLOCK)
        mask = valid[:, None] & (width < WIDTH)[None, :]
        of = banks.bank_of + tl.load(given.layer_set + request).to(tl.int64) * LAYERS
        taken = tl.load(of + layer)
        at_full = lane_row(banks, taken, full, valid, FULL_BANKS, LANES, PARTS).to(tl.int64)
        at_streaming = lane_row(banks, layer, streaming, valid, FULL_BANKS, LANES, PARTS).to(tl.int64)
        full_at = at_full[:, None] * WIDTH + width[None, :]
        streaming_at = at_streaming[:, None] * WIDTH + width[None, :]
        k_full = tl.load(pool.k + full_at, mask=mask)
        v_full = tl.load(pool.v + full_at, mask=mask)
        k_streaming = tl.load(pool.k + streaming_at, mask=mask)
        v_streaming = tl.load(pool.v + streaming_at, mask=mask)
        tl.store(pool.k + streaming_at, k_full, mask=mask)
        tl.store(pool.v + streaming_at, v_full, mask=mask)
        tl.store(pool.k + full_at, k_streaming, mask=mask)
        tl.store(pool.v + full_at, v_streaming, mask=mask)


def tile_positions(width: int) -> int:
    """Positions of a tile of these kernels for K and V rows of ``width`` elements."""
    return max(1, min(16, 8192 // int(triton.next_power_of_2(width))))


def store_new(pool: KV, new: KV, layer: int, tiles: Tiles, given: Requests, banks: LayerBanks) -> None:
    """Put new K and V of a prefill into the banks where ``layer`` is: of undecided requests, its own number.

    Args:
        pool: the flat pool.
        new: [tokens, KV heads, dim] of the batch, in the pool's dtype.
        layer: index of the layer.
        tiles: of the new tokens.
        given: the requests of the batch.
        banks: where the layers of the requests are.
    """
    if tiles.number == 0:
        return
    width = pool.k[0].numel()
    _store_new[(tiles.number,)](
        pool,
        new,
        new.k.stride(0),
        new.v.stride(0),
        tiles.table,
        given=given,
        banks=banks.args,
        layer=layer,
        **banks.constants,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        BLOCK_P=tile_positions(width),
        num_warps=8,
    )


def exchange(
    pool: KV, layer: int, tiles: Tiles, given: Requests, banks: LayerBanks, popped: torch.Tensor
) -> None:
    """Once a layer from P on has its place: it and the layer that was popped for it change banks.

    Args:
        pool: the flat pool.
        layer: index of the layer.
        tiles: of all positions of requests whose layers are selected.
        given: the requests of the batch.
        banks: where the layers of the requests are, ``layer`` included.
        popped: int32 [D], from ``queue_step``.
    """
    if tiles.number == 0:
        return
    width = pool.k[0].numel()
    _exchange[(tiles.number,)](
        pool,
        tiles.table,
        given=given,
        banks=banks.args,
        popped_ptr=popped,
        layer=layer,
        **banks.constants,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        BLOCK_P=tile_positions(width),
        num_warps=8,
    )
