"""What locust measures, against a server whose delays are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gevent import GreenletExit

from lt_sglang.bench.scenario_file import load_scenarios
from lt_sglang.bench.session import WARMUP_TOKENS, Session

from .runs import dump, run, scenario, write
from .slow_server import Delays, serve

FIRST, BETWEEN, TOKENS = 0.30, 0.05, 12
# Scheduling on a busy machine; far below the delays themselves.
SLACK_MS = 60


@pytest.mark.parametrize("api", ["generate", "chat"])
def test_ttft_tpot_and_e2e_are_the_delays_of_the_server(api: str, tmp_path: Path) -> None:
    delays = Delays(first=FIRST, between=BETWEEN)
    with serve(delays) as url:
        load = {"kind": "closed", "users": 4, "requests": 16, "warmup": 2}
        data = scenario(api=api, load=load, traffic={"input": 8, "output": TOKENS})
        done = run(url, data, tmp_path)
    assert done.code == 0, dump(done)
    got = done.summary
    assert got["completed"] == 16 and got["errors"] == 0
    assert got["total_output_tokens"] == 16 * TOKENS
    # An answer is far shorter than the 1024 bytes that iter_lines waits for: read so, TTFT would be E2E.
    assert got["median_ttft_ms"] == pytest.approx(1000 * FIRST, abs=SLACK_MS)
    assert got["median_tpot_ms"] == pytest.approx(1000 * BETWEEN, abs=SLACK_MS / (TOKENS - 1))
    assert got["median_itl_ms"] == pytest.approx(1000 * BETWEEN, abs=SLACK_MS / 2)
    assert got["median_e2e_latency_ms"] == pytest.approx(
        1000 * (FIRST + (TOKENS - 1) * BETWEEN), abs=SLACK_MS
    )
    # Four users, four requests each, one after the other.
    assert got["duration"] == pytest.approx(4 * (FIRST + (TOKENS - 1) * BETWEEN), abs=0.7)
    assert got["concurrency"] == pytest.approx(4, abs=0.7)


def test_a_warm_up_is_short(tmp_path: Path) -> None:
    """It is one request after the other, in which nothing is measured."""
    delays = Delays(first=0.01, between=0.001)
    with serve(delays) as url:
        load = {"kind": "closed", "users": 1, "requests": 1, "warmup": 2}
        aborts = {"share": 1.0, "after_tokens": 50}
        done = run(url, scenario(load=load, traffic={"input": 8, "output": 200}, aborts=aborts), tmp_path)
    asked = [request["sampling_params"]["max_new_tokens"] for request in delays.requests]
    assert asked == [WARMUP_TOKENS, WARMUP_TOKENS, 200], dump(done)
    assert delays.dropped <= 1 and done.summary["aborted"] == 1


def test_an_answer_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    (one,) = load_scenarios(write(tmp_path, scenario(load={"kind": "closed", "users": 1, "requests": 1})))
    session = Session(one, "http://127.0.0.1:9", lambda _: None)

    class Stopped:
        def post(self, *_: Any, **__: Any) -> None:
            raise GreenletExit

    taken = session.take()
    assert taken is not None
    with pytest.raises(GreenletExit):
        session.play(Stopped(), taken)
    assert [sample.status for sample in session.samples] == ["error"]
    assert session.samples[0].error.startswith("cut off") and session.over


def test_refused_and_broken_answers_are_errors(tmp_path: Path) -> None:
    load = {"kind": "closed", "users": 4, "requests": 12, "warmup": 0}
    data = scenario(load=load, gates={"errors": {"max": 4}})
    with serve(Delays(first=0.01, between=0.01, fail_every=4, break_every=5)) as url:
        done = run(url, data, tmp_path)
    assert done.code == 1, dump(done)
    assert done.summary["errors"] == 5 and done.summary["completed"] == 7
    errors = [row["error"] for row in done.samples if row["status"] == "error"]
    assert sum("HTTP 500" in error for error in errors) == 3, errors
    assert "FAIL errors <= 4: 5" in done.text


def test_aborted_requests_are_dropped_at_the_server(tmp_path: Path) -> None:
    delays = Delays(first=0.01, between=0.02)
    data = scenario(
        aborts={"share": 1.0, "after_tokens": 3},
        traffic={"input": 8, "output": 100},
        gates={"errors": {"max": 0}, "aborted": {"min": 8}},
    )
    with serve(delays) as url:
        done = run(url, data, tmp_path)
    assert done.summary["aborted"] == 8, dump(done)
    assert all(row["output_tokens"] == "3" for row in done.samples)
    # Nothing was answered in full, which is never a pass.
    assert done.code == 1 and "FAIL completed" in done.text
    assert delays.dropped == 8, "the server still streamed"


def test_open_loop_does_not_wait_for_answers(tmp_path: Path) -> None:
    """At 20 requests/s and 0.6 s each, a dozen are in flight; a closed loop of one user would have one."""
    delays = Delays(first=0.5, between=0.02)
    load = {"kind": "poisson", "rate": 20.0, "requests": 40, "warmup": 0}
    with serve(delays) as url:
        done = run(url, scenario(load=load), tmp_path)
    assert done.code == 0, dump(done)
    assert done.summary["completed"] == 40
    assert done.summary["concurrency"] > 5
    starts = sorted(float(row["start"]) for row in done.samples)
    assert starts[-1] == pytest.approx(40 / 20, rel=0.6)


def test_a_conversation_repeats_what_was_said(tmp_path: Path) -> None:
    delays = Delays(first=0.01, between=0.005)
    load = {"kind": "closed", "users": 1, "requests": 2, "warmup": 0}
    traffic = {"input": 10, "output": 4, "turns": 3, "shared": {"prefixes": 1, "tokens": 20}}
    with serve(delays) as url:
        done = run(url, scenario(load=load, traffic=traffic), tmp_path)
    assert done.code == 0, dump(done)
    asked = [request["input_ids"] for request in delays.requests]
    assert [len(ids) for ids in asked] == [30, 44, 58] * 2
    first, second, third = asked[:3]
    answer = [0, 1, 2, 3]
    assert second[:34] == first + answer and third[:48] == second + answer
    assert asked[3][:20] == first[:20] and asked[3][20:] != first[20:]
