"""lt_sglang.dynamic.state: ranks whose layer tables differ."""

from __future__ import annotations

import pytest
import torch

from lt_sglang.config import LightTransferConfig
from lt_sglang.dynamic.arena import Arena
from lt_sglang.dynamic.layer_sets import LayerSetStore
from lt_sglang.dynamic.layout import BankLayout
from lt_sglang.dynamic.prefill import Kind, Prefill
from lt_sglang.dynamic.state import DynamicState, Ranks, TableChecks
from lt_sglang.errors import LightTransferError
from lt_sglang.selection import get_score

LAYERS, KEEP = 6, 3
DECIDED = [Prefill(Kind.DECIDE, row=1, layer_set=2, prefix=0, extend=99, last_queries=32)]


def one_of_two_ranks(other: list[int], check: bool = True) -> DynamicState:
    """The state of a rank that chose banks 0 to 5 for layer set 2, where the other rank chose ``other``."""
    config = LightTransferConfig((0, 2, 4), mode="dynamic", keep=KEEP, check_tables=check)
    layout = BankLayout(KEEP, LAYERS - KEEP, 8, 8, 4, 1, sink_base=8)
    arena = Arena(layout)
    arena.take(KEEP, layout.full_rows, (1, 2), torch.float32, "cpu")
    arena.take(LAYERS - KEEP, layout.streaming_rows, (1, 2), torch.float32, "cpu")
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
    return DynamicState(config, arena, torch.float32, sets, get_score("lighttransfer"), ranks, {})


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


def test_nothing_is_compared_unless_asked_and_decided() -> None:
    state = one_of_two_ranks([5, 4, 3, 2, 1, 0], check=False)
    state.finish(DECIDED)
    asked = one_of_two_ranks([5, 4, 3, 2, 1, 0])
    asked.finish([Prefill(Kind.DECIDED, 1, 2, 0, 99), Prefill(Kind.STAGE, 1, 2, 0, 99)])
    assert state.table_checks == asked.table_checks == TableChecks()
