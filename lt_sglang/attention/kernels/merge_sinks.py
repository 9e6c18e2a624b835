"""Adds the sinks that queries of a prefill see beyond their windows.

Runs under TRITON_INTERPRET=1 and needs nothing above sm80.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lt_sglang.attention.indices import Windows
from lt_sglang.identify.scores.reference import LOG2E


@dataclass(frozen=True)
class Banks:
    """Which bank holds one layer of each request (memory/banks.py). of: int32 [bs]."""

    of: torch.Tensor
    full_banks: int
    streaming_start: int
    streaming_rows: int


@triton.jit
def _merge_sinks(  # type: ignore[no-untyped-def]
    out_ptr,
    window_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    sink_rows_ptr,
    tile_request_ptr,
    tile_token_ptr,
    tile_position_ptr,
    tile_count_ptr,
    query_token_stride,
    key_row_stride,
    value_row_stride,
    scale_log2,
    key_scale,
    value_scale,
    bank_ptr,
    bank_stride,
    streaming_start,
    streaming_rows,
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
    count = tl.load(tile_count_ptr + tile)
    position0 = tl.load(tile_position_ptr + tile)
    request = tl.load(tile_request_ptr + tile).to(tl.int64)
    token = tl.load(tile_token_ptr + tile).to(tl.int64) + tl.arange(0, BLOCK_Q)
    position = position0 + tl.arange(0, BLOCK_Q)
    in_tile = tl.arange(0, BLOCK_Q) < count
    base = tl.zeros([], tl.int64)
    if HAS_BANKS:
        bank = tl.load(bank_ptr + request * bank_stride)
        in_tile = in_tile & (bank >= FULL_BANKS)
        base = (streaming_start + (bank - FULL_BANKS) * streaming_rows).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < DIM
    kv_head = head // GROUP
    query = tl.load(
        query_ptr + token[:, None] * query_token_stride + head * DIM + dim[None, :],
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
            key_ptr + row[None, :] * key_row_stride + kv_head * DIM + dim[:, None],
            mask=real[None, :] & in_dim[:, None],
            other=0.0,
        )
        score = tl.dot(query, key.to(query.dtype)) * (scale_log2 * key_scale)
        seen = real[None, :] & (position[:, None] - sink[None, :] >= RECENT)
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        value = tl.load(
            value_ptr + row[:, None] * value_row_stride + kv_head * DIM + dim[None, :],
            mask=real[:, None] & in_dim[None, :],
            other=0.0,
        )
        mixed = tl.dot(weight.to(query.dtype), value.to(query.dtype)) * value_scale
        acc = acc * shrink[:, None] + mixed
        total = total * shrink + tl.sum(weight, 1)
        top = new_top
    acc = acc / total[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=in_tile[:, None] & in_dim[None, :])


def _unpacked_sinks(
    keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, banks: Banks | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Banks | None]:
    """The sinks alone, in ``dtype``: Triton reads fp8 e4m3 from sm89 on only, and they are few."""
    at = rows.to(torch.int64)
    if banks is not None:
        start = banks.streaming_start + (banks.of.to(torch.int64) - banks.full_banks) * banks.streaming_rows
        at = (at + start[:, None]).clamp(min=0)
        banks = Banks(banks.of, banks.full_banks, 0, 0)
    flat = at.flatten()
    unpacked = [part.view(torch.uint8)[flat].view(part.dtype).to(dtype) for part in (keys, values)]
    return unpacked[0], unpacked[1], torch.arange(len(flat), device=rows.device).view_as(at), banks


@torch.no_grad()
def merge_sinks(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    tiles: SinkTiles,
    windows: Windows,
    scale: float,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    window: torch.Tensor | None = None,
    banks: Banks | None = None,
) -> None:
    """Add the sinks to attention that saw the window only; changes ``out`` in place.

    Args:
        out: [tokens, heads, dim], the window's attention output, unless ``window`` is that.
        lse: float32 [tokens, heads], its log-sum-exp to base 2 (FlashInfer's).
        query: [tokens, heads, dim], last dimension contiguous.
        keys, values: [rows, kv heads, dim], a lazy layer's streaming buffers; in dynamic mode the arena.
        rows: int [bs, w_sink], from ``indices.sink_rows``.
        tiles: which queries belong to which request, from ``make_sink_tiles``.
        scale: softmax scale; key_scale, value_scale: of an fp8 KV cache.
        window: the window's attention output; ``out`` then is written only where it counts.
        banks: in dynamic mode, the layer's bank by request; those that are full in this layer are left alone.
    """
    tokens, heads, dim = query.shape
    if tiles.number == 0 or tokens == 0:
        return
    if keys.element_size() == 1:
        keys, values, rows, banks = _unpacked_sinks(keys, values, rows, banks, query.dtype)
    _merge_sinks[(tiles.number, heads)](
        out,
        out if window is None else window,
        lse,
        query,
        keys,
        values,
        rows,
        tiles.request,
        tiles.token,
        tiles.position,
        tiles.count,
        query.stride(0),
        keys.stride(0),
        values.stride(0),
        scale * LOG2E,
        key_scale,
        value_scale,
        rows if banks is None else banks.of,
        0 if banks is None else banks.of.stride(0),
        0 if banks is None else banks.streaming_start,
        0 if banks is None else banks.streaming_rows,
        HAS_BANKS=banks is not None,
        FULL_BANKS=0 if banks is None else banks.full_banks,
        HEADS=heads,
        GROUP=heads // keys.shape[1],
        SINK=windows.sink_tokens,
        RECENT=windows.recent_tokens,
        DIM=dim,
        BLOCK_DIM=max(16, triton.next_power_of_2(dim)),
        BLOCK_Q=TILE_QUERIES,
        BLOCK_S=min(64, max(16, triton.next_power_of_2(windows.sink_tokens))),
    )


TILE_QUERIES = 64


class SinkTiles:
    """Runs of up to TILE_QUERIES consecutive queries of one request that see sinks.

    request, token, position, count: int32 [number]; token is the run's first row in the batch,
    position its first position in the request.
    """

    def __init__(self, runs: list[tuple[int, int, int, int]], device: torch.device | str) -> None:
        self.number = len(runs)
        table = torch.tensor(runs, dtype=torch.int32).reshape(-1, 4).t().contiguous()
        table = table.to(device, non_blocking=True)
        self.request, self.token, self.position, self.count = table.unbind(0)


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
    return SinkTiles(runs if windows.sink_tokens or every is not None else [], device)
