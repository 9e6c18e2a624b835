"""Plots of a run as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lt_sglang.bench.samples import ABORTED, ERROR, OK, Sample

SIZE = (7.0, 3.2)
DPI = 110


def draw(samples: Sequence[Sample], out: Path) -> list[Path]:
    """Write the plots a run has data for; their paths."""
    done = [one for one in samples if one.status == OK and one.ttft is not None]
    if not done:
        return []
    return [_latencies(done, out), _timeline(samples, out), _in_flight(samples, out)]


def _latencies(done: Sequence[Sample], out: Path) -> Path:
    """How many requests had at most which latency."""
    figure, axes = _figure(3)
    series = {
        "TTFT, ms": [1000 * one.ttft for one in done if one.ttft is not None],
        "TPOT, ms": [1000 * one.tpot for one in done if one.tpot is not None],
        "E2E, ms": [1000 * one.e2e for one in done],
    }
    for axis, (name, values) in zip(axes, series.items(), strict=True):
        ordered = np.sort(values)
        axis.step(ordered, np.arange(1, len(ordered) + 1) / max(1, len(ordered)), where="post")
        axis.set_xlabel(name)
        axis.set_ylim(0, 1.02)
    axes[0].set_ylabel("share of requests")
    return _save(figure, out / "latencies.png")


def _timeline(samples: Sequence[Sample], out: Path) -> Path:
    """TTFT of each request over the time it was sent."""
    figure, (axis,) = _figure(1)
    for status, mark in ((OK, "."), (ABORTED, "x"), (ERROR, "s")):
        some = [one for one in samples if one.status == status]
        if some:
            heights = [1000 * (one.ttft if one.ttft is not None else one.e2e) for one in some]
            axis.plot([one.start for one in some], heights, mark, label=status)
    axis.set_xlabel("sent, s")
    axis.set_ylabel("TTFT, ms")
    axis.legend()
    return _save(figure, out / "timeline.png")


def _in_flight(samples: Sequence[Sample], out: Path) -> Path:
    """Requests in flight, and output tokens a second, over time."""
    figure, (axis,) = _figure(1)
    changes = sorted([(one.start, 1) for one in samples] + [(one.start + one.e2e, -1) for one in samples])
    counts = np.cumsum([step for _, step in changes])
    axis.step([at for at, _ in changes], counts, where="post", label="requests in flight")
    axis.set_xlabel("time, s")
    axis.set_ylabel("requests in flight")
    seconds = changes[-1][0]
    edges = np.linspace(0, seconds, 41)
    tokens = np.zeros(40)
    for one in samples:
        times = one.start + (one.ttft or one.e2e) + np.concatenate(([0.0], np.cumsum(one.itls)))
        weight = one.output_tokens / len(times)
        tokens += np.histogram(times, edges)[0] * weight
    second = axis.twinx()
    second.stairs(tokens / np.diff(edges), edges, color="tab:orange", label="output tokens/s")
    second.set_ylabel("output tokens/s")
    figure.legend(loc="outside upper right", ncols=2)
    return _save(figure, out / "in_flight.png")


def _figure(columns: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
