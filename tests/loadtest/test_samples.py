"""Figures from samples, and gates on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lt_sglang.bench.gates import judge
from lt_sglang.bench.samples import METRICS, Sample, by_kind, summarize
from lt_sglang.bench.scenario import Gate, Slo

NO_SLO = Slo()


def sample(**changes: Any) -> Sample:
    base = Sample(0, 0, "all", "ok", 0.0, 1.5, 0.5, 100, 11, itls=(0.1,) * 10)
    return replace(base, **changes)


def test_tpot_leaves_the_first_token_out() -> None:
    assert sample().tpot == pytest.approx(0.1)
    assert sample(output_tokens=1).tpot is None
    assert sample(ttft=None).tpot is None


def test_percentiles_are_those_of_the_samples() -> None:
    times = np.random.default_rng(0).gamma(2.0, 0.1, 500)
    some = [sample(index=i, ttft=float(t), e2e=float(t) + 1.0) for i, t in enumerate(times)]
    found = summarize(some, NO_SLO)
    assert found["mean_ttft_ms"] == pytest.approx(1000 * times.mean())
    for name, share in (("median", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert found[f"{name}_ttft_ms"] == pytest.approx(1000 * np.percentile(times, share))
    assert found["median_tpot_ms"] == pytest.approx(100)
    assert found["max_itl_ms"] == pytest.approx(100)
    assert set(found) == set(METRICS)


def test_throughput_is_of_what_was_answered() -> None:
    some = [
        sample(start=10.0, e2e=2.0),
        sample(start=11.0, e2e=4.0),
        sample(start=12.0, e2e=1.0, status="aborted", output_tokens=3),
        sample(start=13.0, e2e=7.0, status="error", ttft=None, output_tokens=0),
    ]
    found = summarize(some, NO_SLO)
    assert found["duration"] == pytest.approx(10.0)
    assert (found["completed"], found["aborted"], found["errors"]) == (2, 1, 1)
    assert found["total_output_tokens"] == 22 and found["output_throughput"] == pytest.approx(2.2)
    assert found["input_throughput"] == pytest.approx(20.0)
    assert found["error_rate"] == 0.25
    assert found["concurrency"] == pytest.approx(14 / 10)


def test_goodput_wants_every_limit_met() -> None:
    slo = Slo(ttft_ms=600, tpot_ms=110, e2e_ms=2000)
    some = [
        sample(),
        sample(ttft=0.7),
        sample(e2e=1.9),
        sample(e2e=2.1, ttft=0.5),
        sample(status="aborted"),
        sample(output_tokens=1, e2e=0.5, itls=()),
    ]
    # The third is too slow for each token; a single token has no TPOT to miss.
    assert [one.good(slo) for one in some] == [True, False, False, False, False, True]
    found = summarize(some, slo)
    assert found["slo_attainment"] == pytest.approx(2 / 6)
    assert found["request_goodput"] == pytest.approx(2 / 2.1)


def test_kinds_are_summed_apart() -> None:
    found = by_kind([sample(), sample(kind="rag", output_tokens=3), sample(kind="rag")], NO_SLO)
    assert {kind: one["total_output_tokens"] for kind, one in found.items()} == {"all": 11, "rag": 14}


def test_gates() -> None:
    summary = summarize([sample()], NO_SLO)
    gates = [
        Gate("median_ttft_ms", max=500.0),
        Gate("median_ttft_ms", max=499.0),
        Gate("output_throughput", min=7.0),
        Gate("output_throughput", min=8.0, max=9.0),
    ]
    verdicts = judge(gates, summary)
    assert [one.passed for one in verdicts] == [True, False, True, False, True]
    assert str(verdicts[1]) == "FAIL median_ttft_ms <= 499: 500"
    assert str(verdicts[3]) == "FAIL output_throughput >= 8 and <= 9: 7.333"


def test_errors_fail_unless_a_gate_allows_them() -> None:
    summary = summarize([sample(), sample(status="error")], NO_SLO)
    assert [one.passed for one in judge([], summary)] == [False]
    assert [one.passed for one in judge([Gate("error_rate", max=0.5)], summary)] == [True]


def test_nothing_answered_never_passes() -> None:
    summary = summarize([], NO_SLO)
    assert not all(one.passed for one in judge([], summary))
    assert [one.passed for one in judge([Gate("p99_ttft_ms", max=1e9)], summary)] == [False, True, False]
