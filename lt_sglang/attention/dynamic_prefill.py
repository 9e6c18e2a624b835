"""Plans a prefill of dynamic mode: which calls run, and the lists they read, for all layers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lt_sglang.attention.fa3_lengths import LayerLengths
from lt_sglang.attention.flashinfer_plans import LayerLists, plan_prefill, plan_ragged
from lt_sglang.attention.gathered import GatheredAttention, fits
from lt_sglang.attention.indices import sink_rows, span_slots
from lt_sglang.attention.kernels.extend_dynamic import (
    EVERY,
    FULL_ONLY,
    LAZY_ONLY,
    extend_lists,
    list_pointers,
)
from lt_sglang.attention.kernels.merge_sinks import SinkTiles, make_sink_tiles
from lt_sglang.attention.kernels.place import tile_positions
from lt_sglang.attention.kernels.requests import Requests
from lt_sglang.attention.kernels.tiles import Tiles, make_tiles
from lt_sglang.errors import LightTransferError
from lt_sglang.layers.prefill import Kind, Prefill

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from lt_sglang.attention.dynamic_flashinfer import DynamicFlashInferBackend
    from lt_sglang.attention.runner import HybridRunner

# SGLang's paged wrappers; FA2, which reads as it runs where a list begins and ends.
LAZY, FULL = 0, 1


@dataclass(frozen=True)
class PagedCall:
    """One planned FA2 call; every layer has lists of its own."""

    wrapper: Any
    lists: LayerLists
    window_left: int

    def run(
        self, query: torch.Tensor, kv_cache: Any, layer: RadixAttention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, heads, dim] and float32 [tokens, heads], base 2."""
        self.lists.use(self.wrapper, layer.layer_id)
        out: tuple[torch.Tensor, torch.Tensor] = self.wrapper.forward_return_lse(
            query,
            kv_cache,
            causal=True,
            window_left=self.window_left,
            sm_scale=layer.scaling,
            k_scale=layer.k_scale_float,
            v_scale=layer.v_scale_float,
        )
        return out


@dataclass(frozen=True)
class GatheredCall:
    """One planned FA3 call; a layer's lists of some requests are empty. rows: int32 [L, tokens]."""

    attention: GatheredAttention
    rows: torch.Tensor
    lengths: LayerLengths

    def run(
        self, query: torch.Tensor, kv_cache: Any, layer: RadixAttention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As PagedCall."""
        self.lengths.use(layer.layer_id)
        cache = (kv_cache[0].squeeze(1), kv_cache[1].squeeze(1))
        return self.attention.run(query, None, cache, self.rows[layer.layer_id], layer)


@dataclass(frozen=True)
class PrefillMetadata:
    """What the layers of one prefill share.

    windowed: some request has lazy layers here, which attend to their windows. undecided: some request is
    staged or decided in this prefill.
    Full attention is ragged over the new tokens and over cached ones at ``prefix_rows``, int32 [L, cached
    tokens], None if there are none. A windowed batch has one call for it instead, ``full``, and one for the
    windows, ``lazy``; if too much would be gathered on FA3, ``lengths`` empties what is lazy of the former.
    new_tiles: the new tokens of all requests. cut_tiles: what moves once a layer from P on is decided.
    stage_tiles: of the staged request, whose rows another one may still be read from until then.
    banks: int32 [bs, L], of the decided requests. sink_rows: int [bs, w_sink], within a streaming bank.
    """

    plans: list[Prefill]
    requests: Requests
    windowed: bool
    undecided: bool
    new_tiles: Tiles
    cut_tiles: Tiles
    stage_tiles: Tiles
    popped: torch.Tensor
    banks: torch.Tensor
    sink_rows: torch.Tensor
    lazy_tiles: SinkTiles
    prefix_rows: torch.Tensor | None = None
    lengths: tuple[LayerLengths, ...] = ()
    full: PagedCall | GatheredCall | None = None
    lazy: PagedCall | GatheredCall | None = None


class PrefillPlanner:
    """Makes the PrefillMetadata of a batch; host arithmetic and a few kernels, no waiting."""

    def __init__(self, runner: HybridRunner, backend: DynamicFlashInferBackend) -> None:
        self._runner = runner
        self._backend = backend

    def plan(self, forward_batch: ForwardBatch) -> PrefillMetadata:
        """Plan every call of a prefill batch."""
        state = self._backend.state
        plans = self._runner.prefill_plans(forward_batch)
        rows = forward_batch.req_pool_indices
        device = rows.device
        windows, tables = self._runner.windows(), self._runner.streaming_tables()
        given = self._requests(plans, rows)
        undecided = [plan.kind != Kind.DECIDED for plan in plans]
        # Nothing of a decided request is out of its window yet: full attention is the same.
        windowed = any(
            not late and plan.end > windows.lazy_tokens for late, plan in zip(undecided, plans, strict=True)
        )
        if windowed and any(undecided) and sum(plan.extend for plan in plans) > state.layout.scratch_rows:
            raise LightTransferError(
                f"prefill: a batch of {sum(plan.extend for plan in plans)} tokens does not fit the "
                f"{state.layout.scratch_rows} scratch rows; lower --chunked-prefill-size"
            )
        block = tile_positions(state.arena.keys[0].numel())
        new = [(index, plan.prefix, plan.end) for index, plan in enumerate(plans)]
        cut = [
            (index, 0 if plan.kind == Kind.DECIDE else plan.prefix, plan.end)
            for index, plan in enumerate(plans)
            if plan.kind == Kind.DECIDE or (not windowed and plan.kind == Kind.DECIDED)
        ]
        stage = [run for run, plan in zip(new, plans, strict=True) if plan.kind == Kind.STAGE]
        extends = [plan.extend for plan in plans]
        prefixes = [plan.prefix for plan in plans]
        banks = state.sets.bank_of[given.layer_set.to(torch.int64)]
        ends = [plan.end for plan in plans]
        prefix_rows = None
        lengths: tuple[LayerLengths, ...] = ()
        calls: dict[str, PagedCall | GatheredCall] = {}
        updater, prefix = self._backend.indices_updater_prefill, self._backend.prefix
        fa3 = windowed and prefix.kernels(updater) == "fa3"
        full = ((banks < state.keep) | (given.kind != Kind.DECIDED).unsqueeze(1)).t()
        if windowed:
            before = windows.recent_tokens - 1
            firsts = [max(prefix - before, 0) for prefix in prefixes]
            gathered = fa3 and fits(updater, sum(ends) - sum(firsts))
            calls["lazy"] = self._call(LAZY, plans, given, firsts, ends, before, ~full if gathered else None)
        if windowed and (not fa3 or fits(updater, sum(ends))):
            calls["full"] = self._call(FULL, plans, given, [0] * len(plans), ends, -1, full if fa3 else None)
        else:
            planned = [self._backend.prefill_wrapper_ragged]
            plan_ragged(updater, planned[0], extends)
            if any(prefixes):
                prefix.plan(updater, extends, prefixes)
                planned.append(prefix.wrapper)
                rows_of_all = self._lists(plans, given, [0] * len(plans), prefixes, EVERY).rows
                prefix_rows = rows_of_all.view(state.layout.layers, -1)
            if fa3:
                lengths = tuple(LayerLengths(wrapper, full) for wrapper in planned)
        lazy_here = [windowed and not late for late in undecided]
        return PrefillMetadata(
            plans=plans,
            requests=given,
            windowed=windowed,
            undecided=any(undecided),
            new_tiles=make_tiles(new, block, device),
            cut_tiles=make_tiles(cut, block, device),
            stage_tiles=make_tiles(stage, block, device),
            popped=torch.empty(max(len(plans), 1), dtype=torch.int32, device=device),
            banks=banks,
            sink_rows=sink_rows(rows, tables, windows),
            lazy_tiles=make_sink_tiles(prefixes, extends, windows, device, every=lazy_here),
            prefix_rows=prefix_rows,
            lengths=lengths,
            **calls,
        )

    def _requests(self, plans: list[Prefill], rows: torch.Tensor) -> Requests:
        tables, device = self._runner.streaming_tables(), rows.device
        facts: list[list[int]] = []
        token = offset = deciding = 0
        for plan in plans:
            facts.append(
                [
                    plan.kind,
                    plan.layer_set,
                    plan.prefix,
                    token,
                    offset,
                    deciding if plan.kind == Kind.DECIDE else -1,
                ]
            )
            token += plan.extend
            offset += plan.end
            deciding += plan.kind == Kind.DECIDE
        table = torch.tensor(facts, dtype=torch.int32).t().contiguous().to(device, non_blocking=True)
        ends = torch.tensor([plan.end for plan in plans], dtype=torch.int64).to(device, non_blocking=True)
        rows = rows.to(torch.int64)
        # Copies: the scheduler may write the next batch's slots while this one runs.
        full, streaming = span_slots(rows, torch.zeros_like(ends), ends, offset, tables)
        return Requests(
            kind=table[0],
            layer_set=table[1],
            prefix=table[2],
            token=table[3],
            offset=table[4],
            sink_set=tables.row_of[rows],
            deciding=table[5],
            full=full,
            streaming=streaming,
        )

    def _lists(
        self, plans: list[Prefill], given: Requests, firsts: list[int], ends: list[int], which: int
    ) -> LayerLists:
        state, device = self._backend.state, given.kind.device
        lengths = [end - first for first, end in zip(firsts, ends, strict=True)]
        counts = torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True)
        pointers = list_pointers(state.sets.bank_of, given, counts, state.keep, which)
        rows = extend_lists(
            sum(lengths) * state.layout.layers,
            pointers,
            firsts,
            ends,
            given,
            state.sets.bank_of,
            self._runner.windows(),
            state.layout,
            which,
        )
        return LayerLists(rows, pointers, len(plans))

    def _call(
        self,
        index: int,
        plans: list[Prefill],
        given: Requests,
        firsts: list[int],
        ends: list[int],
        window_left: int,
        fa3: torch.Tensor | None,
    ) -> PagedCall | GatheredCall:
        """Plan attention over positions ``firsts`` to ``ends``, full or lazy (``index``).

        fa3: bool [L, bs], where lists are not empty; None for FA2.
        """
        extends = [plan.extend for plan in plans]
        spans = [end - first for first, end in zip(firsts, ends, strict=True)]
        backend = self._backend
        updater = backend.indices_updater_prefill
        if fa3 is not None:
            attention = (backend.window, backend.whole)[index]
            attention.plan(updater, extends, spans)
            rows = self._lists(plans, given, firsts, ends, EVERY).rows.view(len(fa3), -1)
            return GatheredCall(attention, rows, LayerLengths(attention.wrapper, fa3))
        wrapper = backend.prefill_wrappers_paged[index]
        lists = self._lists(plans, given, firsts, ends, (LAZY_ONLY, FULL_ONLY)[index])
        rows = lists.rows[:1]
        plan_prefill(updater, wrapper, extends, spans, rows, causal=True, window_left=window_left)
        return PagedCall(wrapper, lists, window_left)
