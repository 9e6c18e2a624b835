"""Scores the layers of a prefill's selecting requests and lets them enter their queues, on the device.

Where every request gets the configured list, nothing is scored: its layers are the lazier ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lt_sglang.identify.collect import layer_evidence, selected_positions, single_evidence
from lt_sglang.identify.observation_window import LastQueries
from lt_sglang.identify.queue_kernel import queue_step
from lt_sglang.identify.scores.base import Score
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.identify.state import DynamicState
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.kv import KV

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


class LayerSelector:
    """Selects for one prefill at a time: ``begin`` it, then ``select`` layer by layer, in order.

    Requests prefilled in one chunk are scored together, straight from the batch. The one whose earlier chunks
    were staged is scored by itself, from gathered queries and keys.
    """

    def __init__(self, state: DynamicState) -> None:
        self._state = state
        self._together: _Together | None = None
        self._alone: list[tuple[int, Prefill, _Gathered]] = []
        self._known: tuple[torch.Tensor, torch.Tensor] | None = None
        self._staged: list[tuple[Prefill, int]] = []
        self._selecting = 0
        self._plans: list[Prefill] = []
        self._popped = torch.empty(0)
        self._sets = torch.empty(0)

    def begin(
        self,
        plans: list[Prefill],
        popped: torch.Tensor,
        full_slots: torch.Tensor,
        streaming_slots: torch.Tensor,
    ) -> None:
        """Find the rows that the scores of this prefill read; the same for all layers.

        Args:
            plans: the requests of the batch, in its order.
            popped: int32 [selecting requests or more]; ``select`` writes the layer that each queue popped.
            full_slots: int32, the full slot of every position of the batch's requests, one after the other.
            streaming_slots: as ``full_slots``.
        """
        device = popped.device
        self._plans, self._popped = plans, popped
        direct: list[tuple[Prefill, int]] = []
        order: list[Prefill] = []
        alone: list[tuple[Prefill, int, int]] = []
        self._staged = []
        token = offset = 0
        for plan in plans:
            if plan.kind == Kind.STAGED and self._state.score is not None and plan.laziness is None:
                self._staged.append((plan, token))
            elif plan.kind == Kind.SELECT:
                order.append(plan)
                if plan.laziness is None and plan.prefix:
                    alone.append((plan, token, offset))
                elif plan.laziness is None:
                    direct.append((plan, token))
            token += plan.extend
            offset += plan.end
        self._selecting = len(order)
        if not order:
            return
        sets = [plan.layer_set for plan in order]
        self._sets = torch.tensor(sets, dtype=torch.int32).to(device, non_blocking=True)
        if self._state.score is None:
            return
        known = [(at, plan.laziness) for at, plan in enumerate(order) if plan.laziness is not None]
        self._known = _moved(known, device) if known else None
        positions = [order.index(plan) for plan, _ in direct]
        self._together = _Together(self._state, direct, positions, device) if direct else None
        self._alone = [
            (
                order.index(plan),
                plan,
                _Gathered(
                    self._state,
                    plan,
                    token,
                    (full_slots[offset : offset + plan.end], streaming_slots[offset : offset + plan.end]),
                    device,
                ),
            )
            for plan, token, offset in alone
        ]

    def select(
        self,
        layer: RadixAttention,
        query: torch.Tensor,
        attention: torch.Tensor,
        lse: torch.Tensor | None,
        new: KV,
        forward_batch: Any,
    ) -> None:
        """Score one layer and pop what its queues have no room for; writes ``popped``."""
        # Asked for always: a model that does not show it is found out by the warm-up request at start.
        hidden = self._state.hidden(forward_batch, len(query))
        if not self._staged and not self._selecting:
            return
        assert lse is not None
        batch = LastQueries(query, attention, lse, hidden)
        with self._state.stopwatch:
            if self._selecting:
                self._select(layer, batch, new)
            for plan, token in self._staged:  # after the one whose own earlier queries are kept there
                chunk = batch.part(token, plan.extend)
                self._state.observed.keep(layer.layer_id, chunk, first=plan.prefix == 0)
        if self._selecting and layer.layer_id == self._state.layout.layers - 1:
            self._state.finish(self._plans)
            self._together, self._alone, self._known = None, [], None

    def _select(self, layer: RadixAttention, batch: LastQueries, new: KV) -> None:
        state = self._state
        if state.score is None:
            listed = state.listed(layer.layer_id)
            laziness = torch.full((self._selecting,), listed, dtype=torch.float32, device=new.k.device)
        else:
            laziness = self._laziness(state.score, layer, batch, new)
        queue_step(
            state.sets.bank_of,
            state.sets.laziness,
            sets=self._sets,
            score=laziness,
            popped=self._popped,
            layer=layer.layer_id,
            keep=state.keep,
        )

    def _laziness(self, score: Score, layer: RadixAttention, batch: LastQueries, new: KV) -> torch.Tensor:
        """float32 [D], by the score."""
        state, number = self._state, layer.layer_id
        laziness = torch.empty(self._selecting, dtype=torch.float32, device=new.k.device)
        if self._together is not None:
            evidence = self._together.evidence(layer, batch, new)
            found = score.laziness(evidence)
            if self._alone or self._known is not None:
                laziness[self._together.where] = found
            else:
                laziness = found
        for index, plan, gathered in self._alone:
            last = state.observed.join(number, batch.part(gathered.token, plan.extend), plan.last_queries)
            evidence = single_evidence(
                state, plan, layer, last, gathered.selected(layer, new), gathered.positions
            )
            laziness[index : index + 1] = score.laziness(evidence)
        if self._known is not None:
            where, values = self._known
            laziness[where] = values[:, number]
        return laziness


def _moved(
    known: list[tuple[int, tuple[float, ...]]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [S] places and float32 [S, L] values, on the device."""
    where = torch.tensor([at for at, _ in known], dtype=torch.int64)
    values = torch.tensor([values for _, values in known], dtype=torch.float32)
    return where.to(device, non_blocking=True), values.to(device, non_blocking=True)


class _Together:
    """Requests whose whole prompt is in this batch."""

    def __init__(
        self, state: DynamicState, direct: list[tuple[Prefill, int]], where: list[int], device: Any
    ) -> None:
        self._state = state
        config = state.config
        queries = max(plan.last_queries for plan, _ in direct)
        keys = [selected_positions(plan.end, config.sink_tokens, config.recent_tokens) for plan, _ in direct]
        widest = max(map(len, keys))
        table = []
        for (plan, token), positions in zip(direct, keys, strict=True):
            first = plan.end - plan.last_queries
            absent = [-1] * (queries - plan.last_queries)
            missing = [-1] * (widest - len(positions))
            last = list(range(first, plan.end))
            table.append(
                (
                    [token + p for p in last] + absent,
                    last + absent,
                    [token + p for p in positions] + missing,
                    positions + missing,
                )
            )
        columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*table, strict=True)]
        moved = [column.to(device, non_blocking=True) for column in columns]
        self._queries_at, self._keys_at = (moved[0], moved[1]), (moved[2], moved[3])
        self.where = torch.tensor(where, dtype=torch.int64).to(device, non_blocking=True)

    def evidence(self, layer: RadixAttention, batch: LastQueries, new: KV) -> Evidence:
        return layer_evidence(self._state, layer, batch, new, self._queries_at, self._keys_at)


class _Gathered:
    """The selected keys of a request whose earlier chunks are staged."""

    def __init__(
        self,
        state: DynamicState,
        plan: Prefill,
        token: int,
        slots: tuple[torch.Tensor, torch.Tensor],
        device: Any,
    ) -> None:
        self._state = state
        self.token = token
        config = state.config
        positions = selected_positions(plan.end, config.sink_tokens, config.recent_tokens)
        self.positions = torch.tensor(positions, dtype=torch.int32).to(device, non_blocking=True)
        before = [p for p in positions if p < plan.prefix]
        after = [token + p - plan.prefix for p in positions if p >= plan.prefix]
        at = torch.tensor(before, dtype=torch.int64).to(device, non_blocking=True)
        self._after = torch.tensor(after, dtype=torch.int64).to(device, non_blocking=True)
        self._full, self._streaming = (of_kind.to(torch.int64)[at] for of_kind in slots)

    def selected(self, layer: RadixAttention, new: KV) -> KV:
        """[S, KV heads, dim] at ``positions``."""
        layout, number, kv_dtype = self._state.layout, layer.layer_id, self._state.kv_dtype
        slots = self._full if number < layout.full_banks else self._streaming
        rows = layout.bank_rows(number, slots, self._state.pool.units.rest)
        parts = []
        scales = (layer.k_scale_float, layer.v_scale_float)
        for pool, fresh, scale in zip(self._state.pool.kv, new, scales, strict=True):
            old = pool[rows].view(kv_dtype).to(fresh.dtype)
            if kv_dtype != fresh.dtype:  # stored divided by the scale
                old = old * (scale or 1.0)
            parts.append(torch.cat([old, fresh[self._after]]))
        return KV(*parts)
