"""Adds the sinks that queries of a prefill see beyond their windows.

Runs under TRITON_INTERPRET=1 and needs nothing above sm80.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lt_sglang.attention.indices import Windows
from lt_sglang.attention.kernels.banks import LayerBanks, lane_row
from lt_sglang.identify.scores.reference import LOG2E
from lt_sglang.memory.kv import KV
from lt_sglang.memory.units import UnitShape

TILE_QUERIES = 64


class SinkTiles(NamedTuple):
    """Runs of up to TILE_QUERIES consecutive queries of one request that see sinks; int32 [number] each.

    token: the run's first row in the batch. position: its first position in the request.
    """

    request: torch.Tensor
    token: torch.Tensor
    position: torch.Tensor
    queries: torch.Tensor

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.request)


@dataclass(frozen=True)
class Sinks:
    """Where a batch's sinks are and who sees them. slots: int [bs, w_sink], from ``indices.sink_slots``."""

    slots: torch.Tensor
    tiles: SinkTiles
    windows: Windows


class Scales(NamedTuple):
    """softmax: of the scores. k, v: of an fp8 KV cache."""

    softmax: float
    k: float = 1.0
    v: float = 1.0

    @classmethod
    def of(cls, layer: Any) -> Scales:
        """The scales of SGLang's RadixAttention."""
        return cls(layer.scaling, layer.k_scale_float or 1.0, layer.v_scale_float or 1.0)


class BankColumn(NamedTuple):
    """Which bank holds one layer of each request. of: int32 [bs], ``stride`` elements apart.

    rest, rows: as BankArgs.
    """

    of: torch.Tensor
    stride: int
    rest: torch.Tensor
    rows: int

    @classmethod
    def of_layer(cls, banks: LayerBanks, of: torch.Tensor) -> BankColumn:
        """``of``: int32 [bs], a view."""
        return cls(of, of.stride(0), banks.args.rest, banks.args.rows)


class _Strides(NamedTuple):
    """Elements from one row to the next."""

    query: int
    k: int
    v: int


@triton.jit
def _merge_sinks(  # type: ignore[no-untyped-def]
    out_ptr,
    window_ptr,
    lse_ptr,
    query_ptr,
    cache,
    sink_slots_ptr,
    tiles,
    strides,
    scales,
    banks,
    HAS_BANKS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    count = tl.load(tiles.queries + tile)
    position0 = tl.load(tiles.position + tile)
    request = tl.load(tiles.request + tile).to(tl.int64)
    token = tl.load(tiles.token + tile).to(tl.int64) + tl.arange(0, BLOCK_Q)
    position = position0 + tl.arange(0, BLOCK_Q)
    in_tile = tl.arange(0, BLOCK_Q) < count
    bank = tl.full([], FULL_BANKS, tl.int32)
    if HAS_BANKS:
        bank = tl.load(banks.of + request * banks.stride)
        in_tile = in_tile & (bank >= FULL_BANKS)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < DIM
    kv_head = head // GROUP
    query = tl.load(
        query_ptr + token[:, None] * strides.query + head * DIM + dim[None, :],
        mask=in_tile[:, None] & in_dim[None, :],
        other=0.0,
    )
    out_at = out_ptr + token[:, None] * (HEADS * DIM) + head * DIM + dim[None, :]
    lse_at = lse_ptr + token * HEADS + head
    # Start from the window's softmax: its log2-sum is `top`, its sum 1, its output `out`.
    top = tl.load(lse_at, mask=in_tile, other=0.0)
    total = tl.full([BLOCK_Q], 1.0, tl.float32)
    window_at = window_ptr + token[:, None] * (HEADS * DIM) + head * DIM + dim[None, :]
    acc = tl.load(window_at, mask=in_tile[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
    for offset in range(0, SINK, BLOCK_S):
        sink = offset + tl.arange(0, BLOCK_S)
        real = sink < SINK
        real = real & (bank >= FULL_BANKS)  # a request that is full here has no sinks of its own
        row = tl.load(sink_slots_ptr + request * SINK + sink, mask=real, other=0).to(tl.int64)
        if HAS_BANKS:
            row = lane_row(banks, bank, row, real, FULL_BANKS, LANES, PARTS).to(tl.int64)
        key = tl.load(
            cache.k + row[None, :] * strides.k + kv_head * DIM + dim[:, None],
            mask=real[None, :] & in_dim[:, None],
            other=0.0,
        )
        score = tl.dot(query, key.to(query.dtype)) * (scales.softmax * scales.k)
        seen = real[None, :] & (position[:, None] - sink[None, :] >= RECENT)
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        value = tl.load(
            cache.v + row[:, None] * strides.v + kv_head * DIM + dim[None, :],
            mask=real[:, None] & in_dim[None, :],
            other=0.0,
        )
        mixed = tl.dot(weight.to(query.dtype), value.to(query.dtype)) * scales.v
        acc = acc * shrink[:, None] + mixed
        total = total * shrink + tl.sum(weight, 1)
        top = new_top
    acc = acc / total[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=in_tile[:, None] & in_dim[None, :])


def _unpacked(
    cache: KV, slots: torch.Tensor, banks: tuple[BankColumn, UnitShape] | None, dtype: torch.dtype
) -> tuple[KV, torch.Tensor]:
    """The sinks alone, in ``dtype``, and where: Triton reads fp8 e4m3 from sm89 on only, and they are few."""
    at = slots.to(torch.int64)
    if banks is not None:
        column, shape = banks
        within = (column.of.to(torch.int64) - shape.full_layers).clamp(min=0)
        part = (within // shape.lanes)[:, None]
        if shape.parts > 1:
            rest = column.rest.view(shape.parts - 1, -1)
            at = torch.where(part > 0, rest[(part - 1).clamp(min=0), at].to(torch.int64), at)
        at = at + (within % shape.lanes)[:, None] * column.rows
    flat = at.flatten()
    unpacked = KV(*(buffer.view(torch.uint8)[flat].view(buffer.dtype).to(dtype) for buffer in cache))
    return unpacked, torch.arange(len(flat), device=slots.device).view_as(at)


@torch.no_grad()
def merge_sinks(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    cache: KV,
    sinks: Sinks,
    scales: Scales,
    window: torch.Tensor | None = None,
    banks: tuple[BankColumn, UnitShape] | None = None,
) -> None:
    """Add the sinks to attention that saw the window only; changes ``out`` in place.

    Args:
        out: [tokens, heads, dim], the window's attention output, unless ``window`` is that.
        lse: float32 [tokens, heads], its log-sum-exp to base 2 (FlashInfer's).
        query: [tokens, heads, dim], last dimension contiguous.
        cache: a lazy layer's streaming buffers; in dynamic mode the flat pool.
        sinks: of the batch.
        scales: of the layer.
        window: the window's attention output; ``out`` then is written only where it counts.
        banks: in dynamic mode, the layer's bank by request; requests that are full in this layer are left
            alone.
    """
    tokens, heads, dim = query.shape
    if sinks.tiles.number == 0 or tokens == 0:
        return
    slots = sinks.slots
    column, shape = banks or (BankColumn(slots, 0, slots, 0), UnitShape(0, 1))
    lanes, parts = shape.lanes, shape.parts
    if cache.k.element_size() == 1:
        cache, slots = _unpacked(cache, slots, banks, query.dtype)
        column, lanes, parts = column._replace(rows=0), 1, 1
    _merge_sinks[(sinks.tiles.number, heads)](
        out,
        out if window is None else window,
        lse,
        query,
        cache,
        slots,
        tiles=sinks.tiles,
        strides=_Strides(query.stride(0), cache.k.stride(0), cache.v.stride(0)),
        scales=scales._replace(softmax=scales.softmax * LOG2E),
        banks=column,
        HAS_BANKS=banks is not None,
        FULL_BANKS=shape.full_layers,
        LANES=lanes,
        PARTS=parts,
        HEADS=heads,
        GROUP=heads // cache.k.shape[1],
        SINK=sinks.windows.sink_tokens,
        RECENT=sinks.windows.recent_tokens,
        DIM=dim,
        BLOCK_DIM=max(16, triton.next_power_of_2(dim)),
        BLOCK_Q=TILE_QUERIES,
        BLOCK_S=min(64, max(16, triton.next_power_of_2(sinks.windows.sink_tokens))),
    )


def make_sink_tiles(
    prefix_lens: list[int],
    extend_lens: list[int],
    windows: Windows,
    device: torch.device | str,
    every: Sequence[bool] | None = None,
) -> SinkTiles:
    """Tiles of every query at position >= w_recent; the others see all sinks inside their window.

    every: instead, by request, whether to take all of its queries, sinks or not, or none.
    """
    runs: list[tuple[int, int, int, int]] = []
    token = 0
    for request, (prefix, extend) in enumerate(zip(prefix_lens, extend_lens, strict=True)):
        if every is None:
            skip = min(max(windows.recent_tokens - prefix, 0), extend)
        else:
            skip = 0 if every[request] else extend
        for offset in range(skip, extend, TILE_QUERIES):
            runs.append((request, token + offset, prefix + offset, min(TILE_QUERIES, extend - offset)))
        token += extend
    if not windows.sink_tokens and every is None:
        runs = []
    table = torch.tensor(runs, dtype=torch.int32).reshape(-1, 4).t().contiguous()
    return SinkTiles(*table.to(device, non_blocking=True).unbind(0))
