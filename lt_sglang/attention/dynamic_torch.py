"""Dynamic mode on a CPU, in plain torch: the reference of the GPU path.

Request by request and layer by layer; host synchronisation does not matter here.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from lt_sglang.attention.indices import sink_slots
from lt_sglang.attention.static_torch import QUERY_BLOCK, attend, attend_streaming, decode_slot_lists
from lt_sglang.identify.collect import selected_positions, single_evidence
from lt_sglang.identify.observation_window import LastQueries
from lt_sglang.identify.queue import NOBODY, queue_step
from lt_sglang.identify.scores.reference import LOG2E
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.kv import KV

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from lt_sglang.attention.runner import HybridRunner


class DynamicTorchBackend(TorchNativeAttnBackend):
    """TorchNativeAttnBackend in which every request has lazy layers of its own."""

    def __init__(self, model_runner: HybridRunner) -> None:
        super().__init__(model_runner)
        self._runner = model_runner
        self.kv_index_translator = model_runner.kv_index_translator
        assert model_runner.dynamic is not None
        self._state = model_runner.dynamic
        self._prefills: list[Prefill] = []
        self._full: list[torch.Tensor] = []  # by request, full slot of every position
        self._streaming: list[torch.Tensor] = []  # by request, streaming slot of every position (0: none)
        self._lazy: list[torch.Tensor] = []  # by request of a decode, rows a lazy layer reads in its bank
        self._sinks = torch.empty(0)
        self._banks: list[list[int]] = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Look up, once a forward, where every position of every request is."""
        if forward_batch.forward_mode.is_idle():
            return
        tables, windows = self._runner.streaming_tables(), self._runner.windows()
        rows = forward_batch.req_pool_indices
        lengths = forward_batch.seq_lens.tolist()
        self._full = [
            tables.req_to_token[row, :length].to(torch.int64)
            for row, length in zip(rows.tolist(), lengths, strict=True)
        ]
        self._streaming = [tables.full_to_streaming[slots] for slots in self._full]
        sets = self._state.sets
        self._banks = sets.bank_of[sets.set_of[rows].to(torch.int64)].tolist()
        if forward_batch.forward_mode.is_decode():
            self._lazy = decode_slot_lists(rows, forward_batch.seq_lens, tables, windows)
            return
        self._sinks = sink_slots(rows, tables, windows)
        self._prefills = self._runner.prefill_plans.of(forward_batch)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[requests, heads * dim]."""
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(query)
        layout = self._state.layout
        for index in range(len(query)):
            bank = self._banks[index][layer.layer_id]
            if bank < layout.full_banks:
                slots, new = self._full[index], self._full[index][-1:]
            else:
                slots, new = self._lazy[index], self._streaming[index][-1:]
            one = slice(index, index + 1)
            self._store(bank, new, KV(k[one], v[one]))
            out[one] = attend(query[one], self._load(bank, slots, query.dtype), None, layer)
        return out.view(query.shape[0], -1)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[tokens, heads * dim] of the batch's new tokens."""
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(query)
        hidden = self._state.hidden(forward_batch, len(query))
        ends = [0, *itertools.accumulate(prefill.extend for prefill in self._prefills)]
        # A request that will be staged comes after the one that was: its last queries are kept in one place.
        for index in sorted(range(len(self._prefills)), key=lambda i: self._prefills[i].kind == Kind.STAGED):
            prefill = self._prefills[index]
            new = slice(ends[index], ends[index + 1])
            here = None if hidden is None else hidden[new]
            if prefill.kind == Kind.KNOWN:
                out[new] = self._known(index, prefill, query[new], KV(k[new], v[new]), layer)
            else:
                out[new] = self._undecided(index, prefill, query[new], KV(k[new], v[new]), layer, here)
        if layer.layer_id == self._state.layout.layers - 1:
            self._state.finish(self._prefills)
        return out.view(q.shape[0], -1)

    def _known(
        self, index: int, prefill: Prefill, query: torch.Tensor, new: KV, layer: RadixAttention
    ) -> torch.Tensor:
        bank = self._banks[index][layer.layer_id]
        if bank < self._state.layout.full_banks:
            self._store(bank, self._full[index][prefill.prefix :], new)
            return _causal(query, self._load(bank, self._full[index], query.dtype), prefill.prefix, layer)
        self._store(bank, self._streaming[index][prefill.prefix :], new)

        def load(slots: torch.Tensor) -> KV:
            return self._load(bank, slots, query.dtype)

        slots, sinks, windows = self._streaming[index], self._sinks[index], self._runner.windows()
        return attend_streaming(query, prefill.prefix, slots, sinks, windows, load, layer)

    def _undecided(
        self,
        index: int,
        prefill: Prefill,
        query: torch.Tensor,
        new: KV,
        layer: RadixAttention,
        hidden: torch.Tensor | None,
    ) -> torch.Tensor:
        state, number = self._state, layer.layer_id
        # Until its layers are known, a request has layer l in bank l, and a streaming slot for every token.
        slots = self._full[index] if number < state.keep else self._streaming[index]
        before = self._load(number, slots[: prefill.prefix], query.dtype)
        # Through the KV cache's dtype, as if they had been read back.
        rounded = (part.to(state.kv_dtype).to(query.dtype) for part in new)
        whole = KV(*(torch.cat(parts) for parts in zip(before, rounded, strict=True)))
        out = _causal(query, whole, prefill.prefix, layer)
        chunk = None
        if state.score is not None and prefill.laziness is None:
            chunk = LastQueries(query, out, torch.empty(0), hidden)
            count = state.observed.count if prefill.kind == Kind.STAGED else prefill.last_queries
            with state.stopwatch:
                chunk = chunk.last(count)
                chunk = replace(chunk, lse=_log2_sum(chunk.query, whole.k, layer))
        self._store(number, slots[prefill.prefix :], new)
        if prefill.kind == Kind.STAGED:
            if chunk is not None:
                state.observed.keep(number, chunk, first=prefill.prefix == 0)
            return out
        with state.stopwatch:
            sets = torch.tensor([prefill.layer_set])
            if prefill.laziness is not None:
                state.sets.laziness[sets, number] = prefill.laziness[number]
            elif chunk is None:
                state.sets.laziness[sets, number] = state.listed(number)
            else:
                state.sets.laziness[sets, number] = self._laziness(prefill, chunk, whole, layer)
            popped = int(queue_step(state.sets.bank_of, state.sets.laziness, sets, number, state.keep))
        if popped not in (NOBODY, number):
            self._exchange(index, prefill, number)
        return out

    def _laziness(
        self, prefill: Prefill, chunk: LastQueries, whole: KV, layer: RadixAttention
    ) -> torch.Tensor:
        state = self._state
        assert state.score is not None
        last = state.observed.join(layer.layer_id, chunk, prefill.last_queries)
        positions = selected_positions(prefill.end, state.config.sink_tokens, state.config.recent_tokens)
        chosen = torch.tensor(positions, dtype=torch.int32)
        return state.score.laziness(single_evidence(state, prefill, layer, last, whole.at(chosen), chosen))

    def _exchange(self, index: int, prefill: Prefill, number: int) -> None:
        """The popped layer and layer ``number``, which takes its full bank, change places."""
        taken = int(self._state.sets.bank_of[prefill.layer_set, number])
        full, streaming = self._rows(taken, self._full[index]), self._rows(number, self._streaming[index])
        for pool in self._state.pool.kv:
            pool[full], pool[streaming] = pool[streaming], pool[full]

    def _rows(self, bank: int, slots: torch.Tensor) -> torch.Tensor:
        return self._state.layout.bank_rows(bank, slots, self._state.pool.units.rest)

    def _store(self, bank: int, slots: torch.Tensor, new: KV) -> None:
        rows = self._rows(bank, slots)
        for pool, part in zip(self._state.pool.kv, new, strict=True):
            pool[rows] = part.to(self._state.kv_dtype).view(pool.dtype)

    def _load(self, bank: int, slots: torch.Tensor, dtype: torch.dtype) -> KV:
        read = self._state.pool.kv.at(self._rows(bank, slots))
        return KV(*(part.view(self._state.kv_dtype).to(dtype) for part in read))


def _causal(query: torch.Tensor, read: KV, prefix: int, layer: RadixAttention) -> torch.Tensor:
    """Full attention of queries from position ``prefix`` on; [queries, heads, dim]."""
    out = torch.empty_like(query)
    for offset in range(0, len(query), QUERY_BLOCK):
        block = slice(offset, min(offset + QUERY_BLOCK, len(query)))
        seen = prefix + block.stop
        position = torch.arange(prefix + offset, seen)[:, None]
        mask = torch.arange(seen)[None, :] <= position
        out[block] = attend(query[block], read.where(slice(seen)), mask, layer)
    return out


def _log2_sum(query: torch.Tensor, keys: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
    """float32 [queries, heads]: log2-sum-exp of the scores of the last queries of ``keys``."""
    group = query.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->qhk", query.float(), keys.float().repeat_interleave(group, 1))
    first = len(keys) - len(query)
    position = torch.arange(first, len(keys))[:, None, None]
    later = torch.arange(len(keys))[None, None, :] > position
    scores = (scores * layer.scaling).masked_fill(later, -torch.inf)
    return torch.logsumexp(scores, -1) * LOG2E
