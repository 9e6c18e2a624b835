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
from lt_sglang.attention.kernels.banks import LayerBanks
from lt_sglang.identify.scores.reference import LOG2E
from lt_sglang.memory.kv import KV

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
    """Where a batch's sinks are and who sees them. rows: int [bs, w_sink], from ``indices.sink_rows``."""

    rows: torch.Tensor
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
    """Which bank holds one layer of each request. of: int32 [bs], ``stride`` elements apart."""

    of: torch.Tensor
    stride: int
    streaming_start: int
    streaming_rows: int

    @classmethod
    def of_layer(cls, banks: LayerBanks, of: torch.Tensor) -> BankColumn:
        """``of``: int32 [bs], a view."""
        return cls(of, of.stride(0), banks.layout.streaming_start, banks.layout.streaming_rows)


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
    sink_rows_ptr,
    tiles,
    strides,
    scales,
    banks,
    HAS_BANKS: tl.constexpr,
    FULL_BANKS: tl.constexpr,
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
    base = tl.zeros([], tl.int64)
    if HAS_BANKS:
        bank = tl.load(banks.of + request * banks.stride)
        in_tile = in_tile & (bank >= FULL_BANKS)
        base = (banks.streaming_start + (bank - FULL_BANKS) * banks.streaming_rows).to(tl.int64)
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
        real = real & (base >= 0)  # the row of a request that is full here is nowhere
        row = base + tl.load(sink_rows_ptr + request * SINK + sink, mask=real, other=0).to(tl.int64)
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
    cache: KV, rows: torch.Tensor, banks: BankColumn | None, full_banks: int, dtype: torch.dtype
) -> tuple[KV, torch.Tensor, BankColumn | None]:
    """The sinks alone, in ``dtype``: Triton reads fp8 e4m3 from sm89 on only, and they are few."""
    at = rows.to(torch.int64)
    if banks is not None:
        start = banks.streaming_start + (banks.of.to(torch.int64) - full_banks) * banks.streaming_rows
        at = (at + start[:, None]).clamp(min=0)
        banks = banks._replace(streaming_start=0, streaming_rows=0)
    flat = at.flatten()
    unpacked = KV(*(part.view(torch.uint8)[flat].view(part.dtype).to(dtype) for part in cache))
    return unpacked, torch.arange(len(flat), device=rows.device).view_as(at), banks


@torch.no_grad()
def merge_sinks(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    cache: KV,
    sinks: Sinks,
    scales: Scales,
    window: torch.Tensor | None = None,
    banks: tuple[BankColumn, int] | None = None,
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
        banks: in dynamic mode, the layer's bank by request, and P; requests that are full in this layer are
            left alone.
    """
    tokens, heads, dim = query.shape
    if sinks.tiles.number == 0 or tokens == 0:
        return
    column, full_banks = banks or (None, 0)
    rows = sinks.rows
    if cache.k.element_size() == 1:
        cache, rows, column = _unpacked(cache, rows, column, full_banks, query.dtype)
    _merge_sinks[(sinks.tiles.number, heads)](
        out,
        out if window is None else window,
        lse,
        query,
        cache,
        rows,
        tiles=sinks.tiles,
        strides=_Strides(query.stride(0), cache.k.stride(0), cache.v.stride(0)),
        scales=scales._replace(softmax=scales.softmax * LOG2E),
        banks=BankColumn(rows, 0, 0, 0) if column is None else column,
        HAS_BANKS=column is not None,
        FULL_BANKS=full_banks,
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
