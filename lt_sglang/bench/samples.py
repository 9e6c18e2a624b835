"""What was measured: one sample a request, and the figures made from them.

Names of figures are those of ``sglang.bench_serving``. Percentiles are of the samples, not of histograms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lt_sglang.bench.scenario import Load, Slo, Traffic

OK, ABORTED, ERROR = "ok", "aborted", "error"
SETTLING = 20.0  # seconds in which requests of the phase before still run


@dataclass(frozen=True)
class Sample:
    """One request; times in seconds, ``start`` since the run began.

    status: ok (answered in full), aborted (by us, as the scenario asks) or error. ttft: to the first token,
    None if there was none. itls: between events that carried tokens. kind: which traffic of the scenario.
    cached_tokens: None where the server does not say.
    """

    index: int
    turn: int
    kind: str
    status: str
    start: float
    e2e: float
    ttft: float | None
    input_tokens: int
    output_tokens: int
    cached_tokens: int | None = None
    itls: tuple[float, ...] = field(default=(), repr=False)
    error: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None with fewer than two tokens."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)

    def good(self, slo: Slo) -> bool:
        """Whether it was answered within every limit; a single token has no TPOT to miss."""
        if self.status != OK or self.ttft is None:
            return False
        measured = ((self.ttft, slo.ttft_ms), (self.tpot or 0.0, slo.tpot_ms), (self.e2e, slo.e2e_ms))
        return all(limit is None or 1000 * value <= limit for value, limit in measured)


_SERIES = ("ttft", "tpot", "itl", "e2e_latency")
_STATISTICS = ("mean", "median", "std", "p90", "p95", "p99")
METRICS = (
    *("duration", "completed", "errors", "aborted", "error_rate", "total_input_tokens"),
    *("total_output_tokens", "cached_tokens", "request_throughput", "input_throughput"),
    *("output_throughput", "total_throughput", "concurrency", "request_goodput", "slo_attainment"),
    *(f"{statistic}_{series}_ms" for series in _SERIES for statistic in _STATISTICS),
    "max_itl_ms",
)


def unit_of(metric: str) -> str:
    """The unit of a figure of METRICS; empty of numbers and shares."""
    if metric.endswith("_ms"):
        return "ms"
    if metric in ("request_throughput", "request_goodput"):
        return "requests/s"
    if metric.endswith("_throughput"):
        return "tokens/s"
    return {"duration": "s"}.get(metric, "tokens" if metric.endswith("_tokens") else "")


def summarize(samples: Sequence[Sample], slo: Slo) -> dict[str, float | None]:
    """Every metric of METRICS; None for latencies that no request has and cached_tokens that no answer told.

    Throughput counts answered requests only, over the time from the first request to the last answer of
    any kind. concurrency: requests in flight on average. slo_attainment: good requests among all sent.
    """
    done = [one for one in samples if one.status == OK]
    begin = min((one.start for one in samples), default=0.0)
    duration = max((one.start + one.e2e for one in samples), default=0.0) - begin
    per_second = 1 / duration if duration else 0.0
    errors = sum(one.status == ERROR for one in samples)
    good = sum(one.good(slo) for one in samples)
    inputs, outputs = (sum(getattr(one, name) for one in done) for name in ("input_tokens", "output_tokens"))
    values: dict[str, float | None] = {
        "duration": duration,
        "completed": len(done),
        "errors": errors,
        "aborted": sum(one.status == ABORTED for one in samples),
        "error_rate": errors / len(samples) if samples else 0.0,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "cached_tokens": sum(cached) if len(cached := _known(done)) == len(done) else None,
        "request_throughput": len(done) * per_second,
        "input_throughput": inputs * per_second,
        "output_throughput": outputs * per_second,
        "total_throughput": (inputs + outputs) * per_second,
        "concurrency": sum(one.e2e for one in samples) * per_second,
        "request_goodput": good * per_second,
        "slo_attainment": good / len(samples) if samples else 0.0,
    }
    series: dict[str, list[float]] = {
        "ttft": [one.ttft for one in done if one.ttft is not None],
        "tpot": [one.tpot for one in done if one.tpot is not None],
        "itl": [gap for one in done for gap in one.itls],
        "e2e_latency": [one.e2e for one in done],
    }
    for name, measured in series.items():
        values.update(_statistics(name, measured))
    values["max_itl_ms"] = 1000 * max(series["itl"]) if series["itl"] else None
    return values


def tokens_between(samples: Sequence[Sample], begin: float, end: float) -> float:
    """Tokens that came from ``begin`` to ``end``, those of a request behind its first one evenly spread."""
    total = 0.0
    for one in samples:
        if one.ttft is None:
            continue
        first, last = one.start + one.ttft, one.start + one.e2e
        total += begin <= first < end
        if one.output_tokens > 1 and last > first:
            within = max(0.0, min(last, end) - max(first, begin))
            total += (one.output_tokens - 1) * within / (last - first)
    return total


def by_phase(samples: Sequence[Sample], traffic: Sequence[Traffic], load: Load) -> dict[str, float]:
    """Tokens a second of each phase's own traffic, without the phase's first SETTLING seconds."""
    found, begin = {}, 0.0
    for kind, phase in zip(traffic, load.phases, strict=False):
        settling = min(SETTLING, phase.seconds / 2)
        own = [one for one in samples if one.kind == kind.name]
        tokens = tokens_between(own, begin + settling, begin + phase.seconds)
        found[kind.name] = tokens / (phase.seconds - settling)
        begin += phase.seconds
    return found


def _known(done: Sequence[Sample]) -> list[int]:
    return [one.cached_tokens for one in done if one.cached_tokens is not None]


def by_kind(samples: Sequence[Sample], slo: Slo) -> dict[str, dict[str, float | None]]:
    """A summary of each kind of traffic; rates are over that kind's own time."""
    kinds = sorted({one.kind for one in samples})
    return {kind: summarize([one for one in samples if one.kind == kind], slo) for kind in kinds}


def _statistics(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    keys = [f"{statistic}_{name}_ms" for statistic in _STATISTICS]
    if not seconds:
        return dict.fromkeys(keys)
    values = 1000 * np.asarray(seconds)
    found: list[Any] = [values.mean(), np.median(values), values.std()]
    found += list(np.percentile(values, (90, 95, 99)))
    return {key: float(value) for key, value in zip(keys, found, strict=True)}
