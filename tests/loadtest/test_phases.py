"""Loads whose traffic changes: who sends what when, and what each phase is measured by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lt_sglang.bench.samples import Sample, by_phase, tokens_between
from lt_sglang.bench.scenario import Load, Phase, Traffic
from lt_sglang.bench.scenario_file import load_scenarios
from lt_sglang.errors import LightTransferError

from .runs import dump, run, scenario, write
from .slow_server import Delays, serve

KINDS = [{"name": name, "input": tokens, "output": 6} for name, tokens in (("a", 8), ("b", 20), ("c", 8))]
PHASES = [{"seconds": 2, "users": 3}, {"seconds": 2, "users": 1}, {"seconds": 2, "users": 3}]


def test_a_phase_at_a_time() -> None:
    load = Load("closed", phases=(Phase(10, 3), Phase(5, 1)))
    assert [load.phase_at(seconds) for seconds in (0, 9.9, 10, 14.9, 15)] == [0, 0, 1, 1, None]
    assert (load.length, load.most_users) == (15, 4)
    assert Load("closed", users=4, seconds=9.0).length == 9
    assert Load("closed", users=4, requests=9).length is None


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({"kind": "poisson", "rate": 1.0}, "load.phases: only with kind closed"),
        ({"kind": "closed", "users": 3}, "load.users: not with phases"),
        ({"kind": "closed", "requests": 3}, "load.requests: not with phases"),
        ({"kind": "closed", "fill": True}, "load.fill: not with phases"),
        ({"kind": "closed", "phases": PHASES[:2]}, "load.phases: 2 phases need as many kinds of traffic"),
        ({"kind": "closed", "phases": [{"seconds": 5}]}, "load.phases[0].users: None is not an integer"),
    ],
)
def test_what_does_not_go_with_phases(load: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = scenario(load={"phases": PHASES, **load}, traffic=KINDS)
    with pytest.raises(LightTransferError) as caught:
        load_scenarios(write(tmp_path, data))
    assert message in str(caught.value)


def test_tokens_of_a_time() -> None:
    """Eleven tokens, from 1.0 to 2.0, and one that came alone at 5.0."""
    some = [Sample(0, 0, "a", "ok", 0.5, 1.5, 0.5, 8, 11), Sample(1, 0, "a", "ok", 4.0, 1.0, 1.0, 8, 1)]
    some.append(Sample(2, 0, "a", "error", 0.0, 9.0, None, 0, 0))
    assert tokens_between(some, 0, 9) == 12
    assert tokens_between(some, 1.5, 9) == pytest.approx(5 + 1)
    assert tokens_between(some, 1.2, 1.4) == pytest.approx(2)


def test_a_phase_is_measured_once_it_has_settled() -> None:
    """100 tokens a second from one user, who still waits as the second phase begins: not its own."""
    some = [Sample(i, 0, "a", "ok", i * 10.0, 10.0, 0.0, 8, 1001) for i in range(9)]
    load = Load("closed", phases=(Phase(60, 1), Phase(40, 1)))
    found = by_phase(some, [Traffic("a"), Traffic("b")], load)
    assert found == {"a": pytest.approx(100, rel=0.01), "b": pytest.approx(0, abs=0.1)}
    assert by_phase(some, [Traffic("a")], Load("closed", users=1, requests=7)) == {}


def test_each_phase_sends_its_own_traffic(tmp_path: Path) -> None:
    delays = Delays(first=0.05, between=0.02)
    with serve(delays) as url:
        load = {"kind": "closed", "phases": PHASES, "warmup": 0}
        done = run(url, scenario(load=load, traffic=KINDS), tmp_path, limit_s=300)
    assert done.code == 0, dump(done)
    assert list(done.data["phases"]) == ["a", "b", "c"] and all(done.data["phases"].values())
    for kind, begin in (("a", 0.0), ("b", 2.0), ("c", 4.0)):
        rows = [row for row in done.samples if row["kind"] == kind]
        starts = sorted(float(row["start"]) for row in rows)
        assert begin - 0.1 <= starts[0] <= begin + 0.9 and starts[-1] < begin + 2.1
        assert {row["input_tokens"] for row in rows} == {"20" if kind == "b" else "8"}
        # No more at once than the phase has users.
        users = 1 if kind == "b" else 3
        spans = [(float(row["start"]), float(row["start"]) + float(row["e2e"])) for row in rows]
        assert max(sum(a <= start < b for a, b in spans) for start in starts) <= users
