"""Plans a prefill of dynamic mode: which calls run, and the lists they read, for all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lt_sglang.attention.fa3_lengths import LayerLengths
from lt_sglang.attention.flashinfer_plans import LayerIndices, paged, plan_prefill, plan_ragged
from lt_sglang.attention.gathered import GatheredAttention, fits
from lt_sglang.attention.indices import StreamingTables, sink_slots, span_slots
from lt_sglang.attention.kernels.banks import LayerBanks
from lt_sglang.attention.kernels.extend_dynamic import every_kv_indices, extend_kv_indices, extend_kv_indptr
from lt_sglang.attention.kernels.merge_sinks import Sinks, make_sink_tiles
from lt_sglang.attention.kernels.place import tile_positions
from lt_sglang.attention.kernels.requests import Requests
from lt_sglang.attention.kernels.tiles import Tiles, make_tiles
from lt_sglang.attention.prefix import PrefixAttention
from lt_sglang.identify.state import DynamicState
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.kv import KV

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention

# SGLang's paged wrappers; FA2, which reads as it runs where a list begins and ends.
LAZY, FULL = 0, 1


@dataclass(frozen=True)
class PrefillCalls:
    """What a prefill may run: FlashInfer's wrappers, and attention built on them.

    updater: SGLang's indices updater for prefills, for heads and dtypes. ragged, paged: SGLang's wrappers.
    prefix: over cached tokens. whole, window: causally over cached and new tokens, all or a window of them.
    """

    updater: Any
    ragged: Any
    paged: Sequence[Any]
    prefix: PrefixAttention
    whole: GatheredAttention
    window: GatheredAttention


@dataclass(frozen=True)
class PagedCall:
    """One planned FA2 call; every layer has lists of its own."""

    wrapper: Any
    lists: LayerIndices
    window_left: int

    def run(self, query: torch.Tensor, cache: KV, layer: RadixAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, heads, dim] and float32 [tokens, heads], base 2."""
        self.lists.use(self.wrapper, layer.layer_id)
        out: tuple[torch.Tensor, torch.Tensor] = self.wrapper.forward_return_lse(
            query,
            paged(cache),
            causal=True,
            window_left=self.window_left,
            sm_scale=layer.scaling,
            k_scale=layer.k_scale_float,
            v_scale=layer.v_scale_float,
        )
        return out


@dataclass(frozen=True)
class GatheredCall:
    """One planned FA3 call; a layer's lists of some requests are empty. kv_indices: int32 [L, tokens]."""

    attention: GatheredAttention
    kv_indices: torch.Tensor
    lengths: LayerLengths

    def run(self, query: torch.Tensor, cache: KV, layer: RadixAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """As PagedCall."""
        self.lengths.use(layer.layer_id)
        return self.attention.run(query, None, cache, self.kv_indices[layer.layer_id], layer)


@dataclass(frozen=True)
class PrefillMetadata:
    """What the layers of one prefill share.

    windowed: some request has lazy layers here, which attend to their windows. undecided: some request is
    staged or selected for in this prefill.
    Full attention is ragged over the new tokens and over cached ones at ``prefix_kv_indices``, int32 [L,
    cached tokens], None if there are none. A windowed batch has one call for it instead, ``full``, and one
    for the windows, ``lazy``; if FA3 would gather too much, ``lengths`` empties what is lazy of the former.
    new_tiles: the new tokens of all requests. select_tiles: all tokens of those whose layers are selected.
    banks: int32 [bs, L], of the known requests. sinks: streaming slots.
    """

    requests: Requests
    windowed: bool
    undecided: bool
    new_tiles: Tiles
    select_tiles: Tiles
    popped: torch.Tensor
    banks: torch.Tensor
    sinks: Sinks
    prefix_kv_indices: torch.Tensor | None = None
    lengths: tuple[LayerLengths, ...] = ()
    full: PagedCall | GatheredCall | None = None
    lazy: PagedCall | GatheredCall | None = None


@dataclass(frozen=True)
class _Batch:
    """The requests of a prefill: ``plans`` on the host, ``given`` on the device."""

    plans: list[Prefill]
    given: Requests

    @property
    def extends(self) -> list[int]:
        return [plan.extend for plan in self.plans]

    @property
    def prefixes(self) -> list[int]:
        return [plan.prefix for plan in self.plans]

    @property
    def ends(self) -> list[int]:
        return [plan.end for plan in self.plans]

    @property
    def undecided(self) -> list[bool]:
        return [plan.kind != Kind.KNOWN for plan in self.plans]


class PrefillPlanner:
    """Makes the PrefillMetadata of a batch; host arithmetic and a few kernels, no waiting.

    Args:
        state: memory and layer tables.
        banks: where the layers of the requests are.
        calls: what may be planned.
    """

    def __init__(self, state: DynamicState, banks: LayerBanks, calls: PrefillCalls) -> None:
        self._state = state
        self._banks = banks
        self._calls = calls

    def plan(
        self, plans: list[Prefill], req_pool_indices: torch.Tensor, tables: StreamingTables
    ) -> PrefillMetadata:
        """Plan every call of a prefill batch."""
        state, windows, device = self._state, self._banks.windows, req_pool_indices.device
        batch = _Batch(plans, _requests(plans, req_pool_indices, tables))
        undecided = any(batch.undecided)
        # Nothing of a decided request is out of its window yet: full attention is the same.
        windowed = any(
            not late and plan.end > windows.lazy_tokens
            for late, plan in zip(batch.undecided, plans, strict=True)
        )
        block = tile_positions(state.pool.kv.k[0].numel())
        new = [(index, plan.prefix, plan.end) for index, plan in enumerate(plans)]
        select = [(index, 0, plan.end) for index, plan in enumerate(plans) if plan.kind == Kind.SELECT]
        banks = state.sets.bank_of[batch.given.layer_set.to(torch.int64)]
        full = ((banks < state.keep) | (batch.given.kind != Kind.KNOWN).unsqueeze(1)).t()
        lazy_here = [windowed and not late for late in batch.undecided]
        tiles = make_sink_tiles(batch.prefixes, batch.extends, windows, device, every=lazy_here)
        return PrefillMetadata(
            requests=batch.given,
            windowed=windowed,
            undecided=undecided,
            new_tiles=make_tiles(new, block, device),
            select_tiles=make_tiles(select, block, device),
            popped=torch.empty(max(len(plans), 1), dtype=torch.int32, device=device),
            banks=banks,
            sinks=Sinks(sink_slots(req_pool_indices, tables, windows), tiles, windows),
            **(self._windowed(batch, full) if windowed else self._ragged(batch, None)),
        )

    def _windowed(self, batch: _Batch, full: torch.Tensor) -> dict[str, Any]:
        """Calls of a batch with lazy layers; ``full``: bool [L, bs], who has full attention where."""
        calls, ends = self._calls, batch.ends
        fa3 = calls.prefix.kernels(calls.updater) == "fa3"
        before = self._banks.windows.recent_tokens - 1
        firsts = [max(prefix - before, 0) for prefix in batch.prefixes]
        lazy: PagedCall | GatheredCall
        if fa3 and fits(calls.updater, sum(ends) - sum(firsts)):
            lazy = self._gathered(calls.window, batch, firsts, ~full)
        else:
            lazy = self._paged(LAZY, batch, firsts, before)
        zeros = [0] * len(ends)
        if not fa3:
            return {"lazy": lazy, "full": self._paged(FULL, batch, zeros, -1)}
        if fits(calls.updater, sum(ends)):
            return {"lazy": lazy, "full": self._gathered(calls.whole, batch, zeros, full)}
        return {"lazy": lazy, **self._ragged(batch, full)}

    def _ragged(self, batch: _Batch, full: torch.Tensor | None) -> dict[str, Any]:
        """Calls over the new tokens, and over cached ones if there are any.

        full: bool [L, bs], on FA3, where some lists are to be empty.
        """
        calls = self._calls
        found: dict[str, Any] = {}
        planned = [calls.ragged]
        plan_ragged(calls.updater, calls.ragged, batch.extends)
        if any(batch.prefixes):
            calls.prefix.plan(calls.updater, batch.extends, batch.prefixes)
            planned.append(calls.prefix.wrapper)
            zeros = [0] * len(batch.plans)
            found["prefix_kv_indices"] = every_kv_indices(self._banks, batch.given, zeros, batch.prefixes)
        if full is not None:
            found["lengths"] = tuple(LayerLengths(wrapper, full) for wrapper in planned)
        return found

    def _gathered(
        self, attention: GatheredAttention, batch: _Batch, firsts: list[int], here: torch.Tensor
    ) -> GatheredCall:
        """Attention over positions from ``firsts`` on; ``here``: bool [L, bs], where lists are not empty."""
        attention.plan(self._calls.updater, batch.extends, _spans(firsts, batch.ends))
        kv_indices = every_kv_indices(self._banks, batch.given, firsts, batch.ends)
        return GatheredCall(attention, kv_indices, LayerLengths(attention.wrapper, here))

    def _paged(self, index: int, batch: _Batch, firsts: list[int], window_left: int) -> PagedCall:
        """Attention over positions from ``firsts`` on, in the layers that are lazy or full (``index``)."""
        spans, wrapper, lazy = _spans(firsts, batch.ends), self._calls.paged[index], index == LAZY
        counts = torch.tensor(spans, dtype=torch.int32).to(batch.given.kind.device, non_blocking=True)
        kv_indptr = extend_kv_indptr(self._banks, batch.given, counts, lazy=lazy)
        kv_indices = extend_kv_indices(self._banks, batch.given, firsts, batch.ends, kv_indptr, lazy=lazy)
        plan_prefill(
            self._calls.updater,
            wrapper,
            batch.extends,
            spans,
            kv_indices[:1],
            causal=True,
            window_left=window_left,
        )
        return PagedCall(wrapper, LayerIndices(kv_indices, kv_indptr, len(spans)), window_left)


def _spans(firsts: list[int], ends: list[int]) -> list[int]:
    return [end - first for first, end in zip(firsts, ends, strict=True)]


def _requests(plans: list[Prefill], req_pool_indices: torch.Tensor, tables: StreamingTables) -> Requests:
    device = req_pool_indices.device
    facts: list[list[int]] = []
    token = offset = selecting = 0
    for plan in plans:
        number = selecting if plan.kind == Kind.SELECT else -1
        facts.append([plan.kind, plan.layer_set, plan.prefix, token, offset, number])
        token += plan.extend
        offset += plan.end
        selecting += plan.kind == Kind.SELECT
    table = torch.tensor(facts, dtype=torch.int32).t().contiguous().to(device, non_blocking=True)
    ends = torch.tensor([plan.end for plan in plans], dtype=torch.int64).to(device, non_blocking=True)
    rows = req_pool_indices.to(torch.int64)
    # Copies: the scheduler may write the next batch's slots while this one runs.
    full, streaming = span_slots(rows, torch.zeros_like(ends), ends, offset, tables)
    sets = tables.sink_set_of[rows].to(torch.int64)
    sinks = torch.where(sets[:, None] >= 0, tables.sink_slots_of[sets.clamp(min=0)], -1)
    return Requests(
        kind=table[0],
        layer_set=table[1],
        prefix=table[2],
        token=table[3],
        offset=table[4],
        sinks=sinks.to(torch.int32),
        selecting=table[5],
        full=full,
        streaming=streaming,
    )
