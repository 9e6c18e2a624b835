"""Steady decode, read from the lines SGLang's scheduler logs."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_DECODE = re.compile(r"Decode batch.*?#running-req: (\d+).*?gen throughput \(token/s\): ([0-9.]+)")
# DP attention: each rank decodes, and logs, requests of its own.
_RANK = re.compile(r"^\[[^]]* DP(\d+)\b")


@dataclass(frozen=True)
class Steady:
    """Decode without prefill in between; under DP attention the ranks' sum.

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
    # By rank, the stretches without prefill on any of them: all ranks wait for each other.
    stretches: list[dict[str, list[tuple[int, float]]]] = [defaultdict(list)]
    for line in lines:
        found = _DECODE.search(line)
        if found:
            rank = _RANK.match(line)
            stretches[-1][rank[1] if rank else ""].append((int(found[1]), float(found[2])))
        elif "Prefill batch" in line:
            stretches.append(defaultdict(list))
    ranks = sorted({rank for stretch in stretches for rank in stretch})
    each = [_steady([stretch[rank] for stretch in stretches if rank in stretch]) for rank in ranks]
    return together(each)


def together(each: Sequence[Steady | None]) -> Steady | None:
    """The sum of what decoded side by side; None if one of them has no steady decode."""
    known = [one for one in each if one]
    if not known or len(known) < len(each):
        return None
    running, throughput, low, high = (
        sum(getattr(one, name) for one in known) for name in ("running", "throughput", "low", "high")
    )
    return Steady(running, throughput, low, high, min(one.intervals for one in known))


def _steady(runs: Sequence[Sequence[tuple[int, float]]]) -> Steady | None:
    most = max(n for run in runs for n, _ in run)
    rates = [rate for run in runs for n, rate in run[1:] if n == most]
    if not rates:
        return None
    return Steady(most, statistics.median(rates), min(rates), max(rates), len(rates))
