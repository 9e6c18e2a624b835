"""Steady decode, read from the lines SGLang's scheduler logs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

_DECODE = re.compile(r"Decode batch.*?#running-req: (\d+).*?gen throughput \(token/s\): ([0-9.]+)")


@dataclass(frozen=True)
class Steady:
    """Decode without prefill in between.

    running: most requests decoding at once. throughput: median tok/s of the log intervals at that number,
    without the first (it still contains prefill). low, high: their range. intervals: how many.
    """

    running: int
    throughput: float
    low: float
    high: float
    intervals: int


def steady_of(lines: Iterable[str]) -> Steady | None:
    """Steady decode from a scheduler's log lines; None if it never decoded twice in a row."""
    runs: list[list[tuple[int, float]]] = [[]]
    for line in lines:
        found = _DECODE.search(line)
        if found:
            runs[-1].append((int(found[1]), float(found[2])))
        elif "Prefill batch" in line:
            runs.append([])
    most = max((n for run in runs for n, _ in run), default=0)
    rates = [rate for run in runs for n, rate in run[1:] if n == most]
    if not rates:
        return None
    return Steady(most, statistics.median(rates), min(rates), max(rates), len(rates))
