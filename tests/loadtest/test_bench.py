"""What a bench starts, in which order, and what it measures only once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.loadtest.bench import Cell, plan
from lt_sglang.loadtest.engines import LIGHTTRANSFER
from lt_sglang.loadtest.fill import filled, held
from lt_sglang.loadtest.machine import COMMIT_VARIABLE, this_machine
from lt_sglang.loadtest.scenario_file import load_scenarios
from lt_sglang.loadtest.servers import specs_of

from .runs import REPOSITORY, run, scenario, write
from .slow_server import Delays, serve

TP8 = REPOSITORY / "loadtest" / "scenarios" / "tp8"


def cells(work: Path, file: str) -> list[Cell]:
    found = load_scenarios(TP8 / file)
    return [Cell(one, specs_of(one, work, ["flashinfer"], most_tp=4)) for one in found]


def started(work: Path, *files: str, rounds: int = 1) -> list[tuple[str, list[str]]]:
    """Each start: the server, and the scenarios measured on it."""
    groups = [cells(work, file) for file in files]
    return [
        (start.spec.name, [cell.scenario.name.removeprefix("table6-") for cell in start.cells])
        for start in plan(groups, rounds)
    ]


def test_a_server_is_started_once_for_all_it_measures(tmp_path: Path) -> None:
    assert started(tmp_path, "1-table6.yaml") == [
        ("stock_flashinfer", ["16k-half", "32k-half"]),
        (LIGHTTRANSFER, ["16k-half"]),
        (LIGHTTRANSFER, ["32k-half"]),
    ]


def test_a_file_reuses_what_another_measured(tmp_path: Path) -> None:
    """DP attention needs no second run of ours, three quarters no second run of stock."""
    files = ("1-table6.yaml", "2-dp-attention.yaml", "4-three-quarters.yaml")
    assert started(tmp_path, *files)[3:] == [
        ("stock_flashinfer", ["dp-attention-16k", "dp-attention-32k"]),
        (LIGHTTRANSFER, ["16k-three-quarters"]),
        (LIGHTTRANSFER, ["32k-three-quarters"]),
    ]
    dp = cells(tmp_path, "2-dp-attention.yaml")[0].specs["flashinfer"]
    assert Path(dp.model).name == "llama-3-70b-qwen3"
    assert dp.flags[-3:] == ("--enable-dp-attention", "--dp-size", "4")


def test_rounds_alternate_and_start_everything_again(tmp_path: Path) -> None:
    once = started(tmp_path, "1-table6.yaml")
    assert started(tmp_path, "1-table6.yaml", rounds=2) == once + once[::-1]


def server(**state: Any) -> dict[str, Any]:
    return {"internal_states": [state]}


POOLS = {"full_tokens": 572868, "expected_requests": 34.54}


@pytest.mark.parametrize(
    ("info", "tokens", "requests"),
    [
        (server(memory_usage={"token_capacity": 314433}), 16584, 18),
        # Two ranks of DP attention, neither of which can take the other's rest.
        ({"internal_states": [{"memory_usage": {"token_capacity": 29999}}] * 2}, 10000, 4),
        (server(lighttransfer={"pools": POOLS}), 16584, 34),
        (server(lighttransfer={"pools": POOLS}), 33168, 17),
        # Shorter prompts need as much of the lazy layers' pool.
        (server(lighttransfer={"pools": POOLS}), 4096, 34),
    ],
)
def test_how_many_requests_a_server_holds(info: dict[str, Any], tokens: int, requests: int) -> None:
    assert held(info, tokens) == requests


def test_memory_is_filled_once(tmp_path: Path) -> None:
    load = {"kind": "closed", "users": 40, "requests": 80, "fill": True}
    (one,) = load_scenarios(write(tmp_path, scenario(load=load, traffic={"input": 90, "output": 10})))
    for capacity, requests in ((2050, 20), (99, 1), (6000, 40)):
        fitting = filled(one, server(memory_usage={"token_capacity": capacity})).load
        assert fitting.users == fitting.requests == requests
    with pytest.raises(LightTransferError, match="does not say how many tokens"):
        filled(one, server())


def test_filling_needs_a_server_that_says_what_it_holds(tmp_path: Path) -> None:
    load = {"kind": "closed", "users": 2, "requests": 2, "warmup": 0, "fill": True}
    with serve(Delays(first=0.01, between=0.01)) as url:
        done = run(url, scenario(load=load), tmp_path)
    assert done.code == 2 and "load.fill needs SGLang's /server_info" in done.text


def test_the_commit_of_a_copy_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, "abc1234")
    assert this_machine().commit == "abc1234"
