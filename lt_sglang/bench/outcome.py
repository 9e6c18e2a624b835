"""Write down a finished run: samples as CSV, figures as JSON, plots, one HTML page."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lt_sglang.bench import plots, report
from lt_sglang.bench.gates import Verdict, judge
from lt_sglang.bench.machine import versions
from lt_sglang.bench.samples import Sample, by_kind, by_phase, summarize, unit_of
from lt_sglang.bench.session import Session

SAMPLES = "samples.csv"
SUMMARY = "summary.json"
REPORT = "report.html"
COLUMNS = (
    *("index", "turn", "kind", "status", "start", "e2e", "ttft", "tpot", "input_tokens", "output_tokens"),
    *("cached_tokens", "error"),
)
# On the terminal; everything else is in the files.
SHOWN = (
    *("completed", "errors", "aborted", "cached_tokens", "duration", "request_throughput"),
    *("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"),
    *("median_e2e_latency_ms", "p99_e2e_latency_ms", "request_goodput"),
)


def finish(session: Session, out: Path) -> list[Verdict]:
    """Write everything into ``out``, print the figures that matter, and judge the gates."""
    out.mkdir(parents=True, exist_ok=True)
    scenario, samples = session.scenario, session.samples
    summary = summarize(samples, scenario.slo)
    verdicts = judge(scenario.gates, summary)
    data: dict[str, Any] = {
        "scenario": asdict(scenario),
        "url": session.url,
        "started_at": session.started_at,
        "summary": summary,
        "kinds": by_kind(samples, scenario.slo) if len(scenario.traffic) > 1 else {},
        "phases": by_phase(samples, scenario.traffic, scenario.load),
        "server": session.server,
        "engine": session.engine,
        "versions": versions(),
        "lt_metrics": session.lt_metrics,
        "choices": session.choices,
        "gates": [{**asdict(one.gate), "value": one.value, "passed": one.passed} for one in verdicts],
        "first_errors": [one.error for one in samples if one.error][:5],
    }
    _write_csv(samples, out / SAMPLES)
    (out / SUMMARY).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    pictures = plots.draw(samples, out)
    (out / REPORT).write_text(report.html(data, verdicts, pictures), encoding="utf-8")
    for name in SHOWN:
        value = summary[name]
        shown = "unknown" if value is None else f"{value:.4g} {unit_of(name)}"
        print(f"{name:24s} {shown}".rstrip())
    for verdict in verdicts:
        print(verdict)
    print(f"report: {out / REPORT}", flush=True)
    return verdicts


def read_summary(out: Path) -> dict[str, Any]:
    """summary.json of a run."""
    data: dict[str, Any] = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    return data


def read_samples(out: Path) -> list[dict[str, str]]:
    """The rows of samples.csv, values as text; a time that was not measured is empty."""
    with (out / SAMPLES).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write_csv(samples: list[Sample], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for one in sorted(samples, key=lambda sample: sample.start):
            values = (getattr(one, name) for name in COLUMNS)
            writer.writerow([f"{value:.6f}" if isinstance(value, float) else value for value in values])
