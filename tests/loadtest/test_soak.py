"""What a long run is judged by: its parts, its limits, what it leaves."""

from __future__ import annotations

import pytest

from lt_sglang.bench.soak import Look, Part, judge, parts, told
from lt_sglang.cli.soak import warn_if_short


def test_parts_of_a_long_run() -> None:
    """One request a second that makes 10 tokens in its second half; the server uses half a core."""
    samples = [{"start": str(at), "ttft": "0.5", "e2e": "1.0", "output_tokens": "10"} for at in range(60)]
    looks = [Look(1000.0 + at, 7 + at / 2, 100.0 + at, 0) for at in range(-1, 62)]
    found = parts(samples, looks, 1000.0, 60.0)
    assert [one.tokens_per_second for one in found] == [10.0] * 6
    assert [one.tokens_per_cpu_second for one in found] == [20.0] * 6
    assert [one.rss_mib for one in found] == [110.0, 120.0, 130.0, 140.0, 150.0, 160.0]
    # Twice as slow in the end.
    slow = [row for at, row in enumerate(samples) if at < 50 or at % 2]
    assert parts(slow, looks, 1000.0, 60.0)[-1].tokens_per_second == 5.0


@pytest.mark.parametrize("gpu", [0, 1000], ids=["cpu", "gpu"])
def test_a_long_run_is_judged_by_its_parts(gpu: int) -> None:
    def run_of(speeds: list[float], memory: list[float]) -> dict[str, bool]:
        # The clock counts on a GPU, the server's CPU time on a CPU; the other one is made to fail.
        made = [(one, 100.0 - at) if gpu else (100.0 - at, one) for at, one in enumerate(speeds)]
        some = [Part(*pair, rss, gpu) for pair, rss in zip(made, memory, strict=True)]
        passed: dict[str, bool] = judge(some, True, [])["passed"]
        return passed

    flat = [2000.0] * 6
    filling = [1000.0, 1600.0, 1900.0, 2000.0, 2005.0, 2010.0]
    leaking = [1000.0 + 100 * at for at in range(6)]
    assert all(run_of([50.0, 49, 50, 51, 50, 48.6], filling).values())
    assert run_of([50.0, 49, 50, 51, 50, 48.4], flat) == {
        "errors": True,
        "throughput": False,
        "memory": True,
        "nothing_left": True,
    }
    assert not run_of([50.0] * 6, leaking)["memory"]
    assert not judge([Part(1.0, 1.0, 1.0, 0)] * 6, True, ["a request"])["passed"]["nothing_left"]


def test_each_limit_is_told_beside_what_was_measured() -> None:
    found = judge([Part(1.0, 50.0 - at, 100.0, 0) for at in range(6)], True, ["a request"])
    lines = told(found)
    assert lines[1] == "FAIL throughput: last part over first 0.900, at least 0.97"
    assert lines[2].startswith("PASS memory: +0.00% from part 4 to 6, at most 1%")
    assert lines[3] == "FAIL nothing_left: idle, it holds nothing: a request"


def test_a_minute_is_said_to_be_too_short(capsys: pytest.CaptureFixture[str]) -> None:
    warn_if_short(60)
    assert "60 s are too short" in capsys.readouterr().err
    warn_if_short(1800)
    assert not capsys.readouterr().err
