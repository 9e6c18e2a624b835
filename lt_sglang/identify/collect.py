"""Which keys and queries of a request the scores look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lt_sglang.identify.observation_window import LastQueries
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.identify.state import DynamicState
from lt_sglang.layers.prefill import Prefill
from lt_sglang.memory.kv import KV

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


def selected_positions(end: int, sink: int, recent: int) -> list[int]:
    """The positions a lazy layer would keep of ``end`` tokens: sinks, then the most recent ones."""
    first = max(end - recent, 0)
    return [*range(min(sink, first)), *range(first, end)]


def layer_evidence(
    state: DynamicState,
    layer: RadixAttention,
    batch: LastQueries,
    kv: KV,
    queries_at: tuple[torch.Tensor, torch.Tensor],
    keys_at: tuple[torch.Tensor, torch.Tensor],
) -> Evidence:
    """The evidence of one layer on this rank.

    queries_at, keys_at: rows and positions, as ``Evidence`` has them.
    """
    return Evidence(
        query=batch.query,
        attention=batch.attention,
        lse=batch.lse,
        keys=kv.k,
        values=kv.v,
        query_rows=queries_at[0],
        query_positions=queries_at[1],
        key_rows=keys_at[0],
        key_positions=keys_at[1],
        scale=layer.scaling,
        heads=state.ranks.heads,
        total_heads=state.ranks.total_heads,
        hidden=batch.hidden,
        project=state.projections.get(layer.layer_id),
        reduce=state.ranks.reduce,
        reduce_max=state.ranks.reduce_max,
    )


def single_evidence(
    state: DynamicState,
    prefill: Prefill,
    layer: RadixAttention,
    last: LastQueries,
    kv: KV,
    positions: torch.Tensor,
) -> Evidence:
    """The evidence of one request whose last queries and selected keys were gathered.

    kv: [S, KV heads, dim] at ``positions`` (int32 [S]).
    """
    device, count = kv.k.device, len(last.query)
    rows = torch.arange(count, dtype=torch.int32, device=device)[None]
    key_rows = torch.arange(len(kv.k), dtype=torch.int32, device=device)[None]
    queries_at = rows, rows + (prefill.end - count)
    return layer_evidence(state, layer, last, kv, queries_at, (key_rows, positions.to(torch.int32)[None]))
