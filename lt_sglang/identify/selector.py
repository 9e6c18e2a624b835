"""Scores the layers of a prefill's selecting requests and lets them enter their queues, on the device.

Where every request gets the configured list, nothing is scored: its layers are the lazier ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lt_sglang.identify.collect import layer_evidence, selected_positions
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
    were staged is scored by itself, with keys from the KV memory.
    """

    def __init__(self, state: DynamicState) -> None:
        self._state = state
        self._together: _Together | None = None
        self._alone: list[tuple[int, _Alone]] = []
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
        self._alone = []
        for plan, token, offset in alone:
            own = slice(offset, offset + plan.end)
            slots = full_slots[own], streaming_slots[own]
            self._alone.append((order.index(plan), _Alone(self._state, plan, token, slots, device)))

    def select(
        self,
        layer: RadixAttention,
        query: torch.Tensor,
        attention: torch.Tensor,
        lse: torch.Tensor | None,
        new: KV,
        forward_batch: Any,
    ) -> None:
        """Score one layer and pop what its queues have no room for; writes ``popped``.

        The layer's new K and V have been stored where requests have them until their layers are known.
        """
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
        kinds = (self._together is not None) + len(self._alone) + (self._known is not None)
        laziness = torch.empty(self._selecting, dtype=torch.float32, device=new.k.device)
        if self._together is not None:
            found = score.laziness(self._together.evidence(layer, batch, new))
            if kinds == 1:
                return found
            laziness[self._together.where] = found
        for index, alone in self._alone:
            found = score.laziness(alone.evidence(layer, batch, new))
            if kinds == 1:
                return found
            laziness[index : index + 1] = found
        if self._known is not None:
            where, values = self._known
            laziness[where] = values[:, layer.layer_id]
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


class _Alone:
    """A request whose earlier chunks are staged: its last queries, and its selected keys in the KV memory."""

    def __init__(
        self,
        state: DynamicState,
        plan: Prefill,
        token: int,
        slots: tuple[torch.Tensor, torch.Tensor],
        device: Any,
    ) -> None:
        self._state = state
        self.plan = plan
        self.token = token
        config = state.config
        positions = selected_positions(plan.end, config.sink_tokens, config.recent_tokens)
        self.positions = torch.tensor(positions, dtype=torch.int32).to(device, non_blocking=True)
        at = self.positions.to(torch.int64)
        self._slots = [of_kind.to(torch.int64)[at] for of_kind in slots]
        rows = torch.arange(plan.last_queries, dtype=torch.int32, device=device)[None]
        self._queries_at = rows, rows + (plan.end - plan.last_queries)
        # By kind and unit: the layers of one unit read the same rows of their lanes.
        self._rows: dict[tuple[bool, int], torch.Tensor] = {}

    def evidence(self, layer: RadixAttention, batch: LastQueries, new: KV) -> Evidence:
        """Of one layer, whose new K and V are stored."""
        state, number = self._state, layer.layer_id
        chunk = batch.part(self.token, self.plan.extend)
        last = state.observed.join(number, chunk, self.plan.last_queries)
        rows, keys = self._rows_of(number), state.pool.lane(number)
        if state.kv_dtype != new.k.dtype:
            scales = (layer.k_scale_float, layer.v_scale_float)
            keys = self._as_new(keys.at(rows[0]), new.k.dtype, scales)
            rows = torch.arange(len(keys.k), dtype=torch.int32, device=rows.device)[None]
        return layer_evidence(state, layer, last, keys, self._queries_at, (rows, self.positions[None]))

    def _rows_of(self, number: int) -> torch.Tensor:
        """int32 [1, S]: rows of the selected keys within the lane of bank ``number``."""
        layout = self._state.layout
        full, part = number < layout.full_banks, layout.shape.part_of(number)
        if (full, part) not in self._rows:
            rows = self._state.pool.rows_of(number, self._slots[0 if full else 1])
            self._rows[full, part] = rows.to(torch.int32)[None]
        return self._rows[full, part]

    def _as_new(self, keys: KV, dtype: torch.dtype, scales: tuple[float | None, float | None]) -> KV:
        """Stored K and V in the model's dtype; they were divided by their scales."""
        stored = (part.view(self._state.kv_dtype).to(dtype) for part in keys)
        return KV(*(part * (scale or 1.0) for part, scale in zip(stored, scales, strict=True)))
