"""Which keys and queries of a deciding request the scores look at."""

from __future__ import annotations

import torch

from lt_sglang.identify.observation_window import LastQueries
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.identify.state import DynamicState
from lt_sglang.layers.prefill import Prefill


def selected_positions(end: int, sink: int, recent: int) -> list[int]:
    """The positions a lazy layer would keep of ``end`` tokens: sinks, then the most recent ones."""
    first = max(end - recent, 0)
    return [*range(min(sink, first)), *range(first, end)]


def layer_evidence(
    state: DynamicState,
    layer: int,
    batch: LastQueries,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries_at: tuple[torch.Tensor, torch.Tensor],
    keys_at: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> Evidence:
    """The evidence of one layer on this rank.

    queries_at, keys_at: rows and positions, as ``Evidence`` has them.
    """
    return Evidence(
        query=batch.query,
        attention=batch.attention,
        lse=batch.lse,
        keys=keys,
        values=values,
        query_rows=queries_at[0],
        query_positions=queries_at[1],
        key_rows=keys_at[0],
        key_positions=keys_at[1],
        scale=scale,
        heads=state.ranks.heads,
        total_heads=state.ranks.total_heads,
        hidden=batch.hidden,
        project=state.projections.get(layer),
        reduce=state.ranks.reduce,
        reduce_max=state.ranks.reduce_max,
    )


def single_evidence(
    state: DynamicState,
    prefill: Prefill,
    layer: int,
    last: LastQueries,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> Evidence:
    """The evidence of one request whose last queries and selected keys were gathered.

    keys, values: [S, kv heads, dim] at ``positions`` (int32 [S]).
    """
    device = keys.device
    count = len(last.query)
    rows = torch.arange(count, dtype=torch.int32, device=device)[None]
    key_rows = torch.arange(len(keys), dtype=torch.int32, device=device)[None]
    return layer_evidence(
        state,
        layer,
        last,
        keys,
        values,
        (rows, rows + (prefill.end - count)),
        (key_rows, positions.to(torch.int32)[None]),
        scale,
    )
