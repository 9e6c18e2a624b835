"""lt_sglang.identify.state: ranks whose layer tables differ."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lt_sglang.config import DEFAULT_LAST_QUERIES, LAST_QUERIES_FIRST_CHUNK, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.identify.observation_window import LastQueries
from lt_sglang.identify.scores.factory import get_score
from lt_sglang.identify.state import DynamicState, Ranks, TableChecks, projections_of, tp_ranks
from lt_sglang.identify.stopwatch import Stopwatch
from lt_sglang.layers.layer_sets import LayerSetStore
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.banks import BankLayout
from lt_sglang.memory.flat_pool import FlatPool
from lt_sglang.memory.units import UnitList, UnitShape

LAYERS, KEEP = 6, 3
DECIDED = [Prefill(Kind.SELECT, row=1, layer_set=2, prefix=0, extend=99, last_queries=32)]


def one_of_two_ranks(other: list[int], check: bool = True) -> DynamicState:
    """The state of a rank that chose banks 0 to 5 for layer set 2, where the other rank chose ``other``."""
    config = LightTransferConfig((0, 2, 4), mode="dynamic", keep=KEEP, check_tables=check)
    shape = UnitShape(KEEP, LAYERS - KEEP)
    units = UnitList(7, 1, shape.parts, "cpu")
    pool = FlatPool(BankLayout(shape, units.rows), units)
    for banks in (shape.full_layers, shape.lazy_layers):
        pool.take(banks, (1, 2), torch.float32, "cpu")
    sets = LayerSetStore(4, config.lazy_layers, LAYERS, 16, "cpu")
    sets.bank_of[2] = torch.arange(LAYERS)
    theirs = torch.tensor([other])
    ranks = Ranks(
        heads=1,
        total_heads=2,
        reduce=lambda tensor: tensor,
        reduce_max=lambda tensor: torch.maximum(tensor, theirs),
        reduce_min=lambda tensor: torch.minimum(tensor, theirs),
    )
    return DynamicState(config, pool, torch.float32, sets, get_score("lighttransfer"), ranks, {})


def test_the_time_is_taken_on_the_pools_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(Stopwatch, "of", lambda device: asked.append(device) or "watch")  # type: ignore[func-returns-value]
    watch: object = one_of_two_ranks([]).stopwatch
    assert watch == "watch"
    assert asked == [torch.device("cpu")]


def test_equal_tables_are_counted() -> None:
    state = one_of_two_ranks([0, 1, 2, 3, 4, 5])
    state.finish(DECIDED)
    state.finish(DECIDED)
    assert state.table_checks == TableChecks(same=2)


def test_the_first_difference_is_counted_shown_and_fatal() -> None:
    """Both ranks name the same layer, whichever is asked."""
    state, counted = one_of_two_ranks([0, 1, 4, 3, 2, 5]), []
    state.before_stop = lambda: counted.append(state.table_checks.different)
    with pytest.raises(LightTransferError, match=r"put layer 2 .* banks \(\[2.0\] and \[4.0\]\)"):
        state.finish(DECIDED)
    assert counted == [1], "shown before the server stops"


def test_nobody_needs_to_be_told_before_the_server_stops() -> None:
    with pytest.raises(LightTransferError, match="put layer 0 of a request into different banks"):
        one_of_two_ranks([1, 0, 2, 3, 4, 5]).finish(DECIDED)


def test_nothing_is_compared_unless_asked_and_decided() -> None:
    state = one_of_two_ranks([5, 4, 3, 2, 1, 0], check=False)
    state.finish(DECIDED)
    asked = one_of_two_ranks([5, 4, 3, 2, 1, 0])
    asked.finish([Prefill(Kind.KNOWN, 1, 2, 0, 99), Prefill(Kind.STAGED, 1, 2, 0, 99)])
    assert state.table_checks == asked.table_checks == TableChecks()


def queries(value: float) -> LastQueries:
    some = torch.full((2, 1, 2), value)
    return LastQueries(some, some, some[..., 0], None)


@pytest.mark.parametrize(
    ("plans", "kept"),
    [
        ([Prefill(Kind.STAGED, 1, 2, 0, 5)], True),
        ([Prefill(Kind.KNOWN, 1, 2, 9, 5)], True),
        # Another prompt that was decided whole, while this one waits between two chunks.
        ([Prefill(Kind.SELECT, 3, 1, 0, 9, 4)], True),
        # The staged one is decided, and in the same batch the next one begins to wait.
        ([Prefill(Kind.SELECT, 1, 2, 5, 9, 4), Prefill(Kind.STAGED, 3, 1, 0, 5)], True),
        ([Prefill(Kind.SELECT, 1, 2, 5, 9, 4)], False),
        ([Prefill(Kind.KNOWN, 4, 0, 0, 9), Prefill(Kind.SELECT, 1, 2, 5, 9, 4)], False),
    ],
)
def test_last_queries_are_kept_as_long_as_somebody_is_staged(plans: list[Prefill], kept: bool) -> None:
    state = one_of_two_ranks([0, 1, 2, 3, 4, 5], check=False)
    state.observed.keep(0, queries(1.0), first=True)
    state.finish(plans)
    if kept:
        assert torch.equal(state.observed.join(0, queries(2.0), 4).query[:2], queries(1.0).query)
    else:
        with pytest.raises(KeyError):
            state.observed.join(0, queries(2.0), 4)


def test_chunk_after_chunk_the_earlier_ones_are_remembered() -> None:
    """A last chunk of one token is scored by the last queries of all that came before."""
    state = one_of_two_ranks([0, 1, 2, 3, 4, 5], check=False)
    assert state.observed.count == DEFAULT_LAST_QUERIES
    for chunk in range(3):
        state.observed.keep(0, queries(float(chunk)), first=chunk == 0)
        state.finish([Prefill(Kind.STAGED, 1, 2, 2 * chunk, 2)])
    found = state.observed.join(0, queries(3.0), DEFAULT_LAST_QUERIES).query[:, 0, 0]
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_first_chunk_is_scored_by_more_queries() -> None:
    state = one_of_two_ranks([0, 1, 2, 3, 4, 5], check=False)
    config = replace(state.config, decide="first-chunk")
    other = DynamicState(config, state.pool, torch.float32, state.sets, None, state.ranks, {})
    assert other.observed.count == LAST_QUERIES_FIRST_CHUNK
    assert (other.keep, other.layout) == (KEEP, state.pool.layout)
    assert [other.listed(layer) for layer in range(LAYERS)] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


def test_the_residual_stream_is_read_only_if_the_score_needs_it() -> None:
    state = one_of_two_ranks([0, 1, 2, 3, 4, 5], check=False)
    assert state.hidden(SimpleNamespace(), 4) is None
    state.score = get_score("residual-error")
    stream = torch.arange(12.0).view(6, 2)
    shown = SimpleNamespace(residual_stream=SimpleNamespace(residual=stream))
    found = state.hidden(shown, 4)
    assert found is not None and torch.equal(found, stream[:4])
    assert torch.equal(state.hidden(shown, 6), stream)  # type: ignore[arg-type]
    for batch, tokens in ((shown, 7), (SimpleNamespace(), 1), (SimpleNamespace(residual_stream=None), 1)):
        with pytest.raises(LightTransferError, match="score: residual-error needs the residual stream"):
            state.hidden(batch, tokens)


@pytest.mark.parametrize(("rank", "heads"), [(0, 4), (1, 4), (2, 1), (3, 0)])
def test_each_rank_has_its_share_of_the_real_heads(
    monkeypatch: pytest.MonkeyPatch, rank: int, heads: int
) -> None:
    """Nine heads on four ranks of four places: SGLang pads at the end."""
    calls: list[object] = []
    group = SimpleNamespace(all_reduce=lambda tensor: ("summed", tensor), device_group="group")
    parallel = SimpleNamespace(attn_tp_group=group, attn_tp_size=4, attn_tp_rank=rank)
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: parallel)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *given, **named: calls.append((given, named)))
    ranks, tensor = tp_ranks(4, 9), torch.ones(2)
    assert (ranks.heads, ranks.total_heads) == (heads, 9)
    assert ranks.reduce(tensor) == ("summed", tensor)
    assert ranks.reduce_max(tensor) is tensor and ranks.reduce_min(tensor) is tensor
    operations = torch.distributed.ReduceOp
    assert calls == [
        ((tensor,), {"op": operation, "group": "group"}) for operation in (operations.MAX, operations.MIN)
    ]
    parallel.attn_tp_size = 1
    alone = tp_ranks(9, 9)
    assert alone.reduce(tensor) is alone.reduce_max(tensor) is alone.reduce_min(tensor) is tensor
    assert len(calls) == 2


def test_output_projections_are_found_beside_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    def attention(layer: int) -> RadixAttention:
        made = object.__new__(RadixAttention)
        torch.nn.Module.__init__(made)
        made.layer_id = layer
        return made

    class Projection(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant_method = SimpleNamespace(apply=lambda *given: given)

    model = torch.nn.Module()
    for layer in range(3):
        block = torch.nn.Module()
        block.attn = attention(layer)
        if layer != 1:
            block.o_proj = Projection()
        setattr(model, f"block{layer}", block)
    found = projections_of(model)
    rows = torch.ones(1)
    assert set(found) == {0, 2}
    assert found[2](rows) == (model.block2.o_proj, rows, None)
