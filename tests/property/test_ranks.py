"""Any order of events on two ranks: their counts are equal after each, so they form the same batches."""

from __future__ import annotations

import time
from functools import partial

import pytest

from tests.property.cpu import Sizes, request
from tests.property.ranks import TwoRanks
from tests.property.test_caches import SEED, STEPS, Machine, drive

SIZES = {
    "static": [
        Sizes(),
        Sizes(sets=3, sink=4, recent=4),
        Sizes(full=2, lazy=3, units=700),
        Sizes(full=0, lazy=2, units=150, limit=300),
        Sizes(page=16, chunk=32, units=30, sink=3),
        Sizes(page=4, chunk=12, units=100, sink=5, recent=9, disable=True),
    ],
    "dynamic": [
        Sizes(dynamic=True),
        Sizes(dynamic=True, full=1, lazy=2, units=390),
        Sizes(dynamic=True, page=16, chunk=32, units=36, sink=3, recent=20),
        Sizes(dynamic=True, listed=True, layer_sets=8, units=260),
    ],
}


class OnTwoRanks(Machine):
    """As Machine; ``check`` compares the ranks after every event."""

    make = TwoRanks


@pytest.mark.parametrize("name", SIZES)
def test_ranks_count_alike(
    name: str, capsys: pytest.CaptureFixture[str], record_property: pytest.RecordProperty
) -> None:
    begin, record = time.perf_counter(), partial(record_property, "seed")
    steps, events, last = drive(OnTwoRanks, SIZES[name], STEPS // 10, record)
    expected = {"finished", "decode", "retracted", "aborted", "hit", "long hit"}
    assert not [event for event in expected if not events[event]], "steps that show nothing"
    with capsys.disabled():
        took = time.perf_counter() - begin
        print(f"\n{name}: {steps} steps, seeds {SEED} to {last}, {took:.0f} s, {dict(events)}")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_rank_that_evicts_alone_shows(dynamic: bool) -> None:
    ranks = TwoRanks(Sizes(dynamic=dynamic))
    ranks.submit(request("a", list(range(30))))
    while not ranks.idle:
        ranks.step()
        ranks.check()
    ranks.other.evict(1, 0)
    with pytest.raises(AssertionError, match="units free"):
        ranks.check()
