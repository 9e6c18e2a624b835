"""Turn reports of tests/gpu/run.py into dated result files and the table in loadtest/results/README.md.

    python loadtest/make_results.py REPORT.json [REPORT.json ...] --date 2026-11-21 --gpu h100 \\
        --hardware "NVIDIA H100 80GB HBM3" --commit SHA [--note TEXT]

A result file compares one cell of a lighttransfer engine with the same cell of a stock engine; where the two
come from different reports, its notes say so. README.md is made from all result
files in the folder, never from the reports.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
VERSIONS = {"sglang": "0.5.23", "torch": "2.14.1", "flashinfer": "0.7.2", "triton": "3.8.0"}


@dataclass(frozen=True)
class Cell:
    """One measured cell: which report and engine it comes from, its task, its numbers."""

    report: str
    engine: str
    config: dict[str, Any] | None
    task: dict[str, Any]

    @property
    def kind(self) -> str:
        """What two cells must share to be compared."""
        if self.task["kind"] == "prefill":
            return f"prefill-{self.task['prompt_tokens']}"
        batch = f"-batch{self.task['requests']}" if self.task["requests"] <= 8 else ""
        return f"decode-{self.task['prompt_tokens']}{batch}"

    def numbers(self) -> dict[str, Any]:
        """The figures of a result file, with their spread."""
        if self.task["kind"] == "prefill":
            seconds = sorted(self.task["seconds"])
            return {"seconds": seconds[len(seconds) // 2], "repeats": self.task["seconds"]}
        steady = self.task["steady"]
        return {
            "requests_running": steady["running"],
            "decode_tokens_per_second": steady["throughput"],
            "spread": [steady["low"], steady["high"]],
            "log_intervals": steady["intervals"],
            "end_to_end_seconds": self.task["seconds"],
        }


def read_cells(path: Path) -> Iterator[Cell]:
    """Every cell of one report that was measured to its end."""
    for engine, entry in json.loads(path.read_text()).get("steady", {}).items():
        for task in entry["cells"]:
            if task["kind"] == "prefill" or task["steady"]:
                yield Cell(path.stem, engine, entry["lighttransfer"], task)


def ratios(base: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """Ours over the baseline, above 1 being better."""
    if "seconds" in base:
        return {"prefill_speed": round(base["seconds"] / ours["seconds"], 3)}
    return {key: round(ours[key] / base[key], 3) for key in ("requests_running", "decode_tokens_per_second")}


def write_results(cells: list[Cell], args: argparse.Namespace) -> None:
    """One file for each lighttransfer cell that has a stock counterpart."""
    stock = {cell.kind: cell for cell in cells if cell.engine.startswith("stock_")}
    for cell in cells:
        base = stock.get(cell.kind)
        if cell.config is None or base is None:
            continue
        scenario = f"{cell.engine}-{cell.kind}".replace("_", "-")
        notes = [args.note] if args.note else []
        if cell.report != base.report:
            notes.append(
                "Baseline and lighttransfer were measured in two runs, on machines of the same kind."
            )
        config = {
            key: cell.config[key]
            for key in ("lazy_layers", "sink_tokens", "recent_tokens", "expected_tokens", "pools")
        }
        measured = {key: value for key, value in cell.task.items() if key not in ("steady", "seconds")}
        result = {
            "scenario": scenario,
            "hardware": args.hardware,
            "versions": VERSIONS,
            "commit": args.commit,
            "seed": 0,
            "workload": {"model": "Mistral-7B shape, dummy weights, bfloat16, tp 1", **measured},
            "baseline": {"engine": base.engine, **base.numbers()},
            "lighttransfer": {"config": config, **cell.numbers()},
            "ratio": ratios(base.numbers(), cell.numbers()),
            "notes": notes,
        }
        path = RESULTS / f"{args.date}-{args.gpu}-{scenario}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path)


def write_table() -> None:
    """README.md of the results folder, from its files."""
    rows = ["# Results", "", "Made by `python loadtest/make_results.py`; one file a row.", ""]
    rows += [
        "| date, GPU, scenario | baseline | LightTransfer | ratio | notes |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        base, ours = (_short(result[side]) for side in ("baseline", "lighttransfer"))
        ratio = ", ".join(f"{value:.2f}x {key.replace('_', ' ')}" for key, value in result["ratio"].items())
        rows.append(f"| {path.stem} | {base} | {ours} | {ratio} | {' '.join(result['notes'])} |")
    (RESULTS / "README.md").write_text("\n".join(rows) + "\n")


def _short(side: dict[str, Any]) -> str:
    if "seconds" in side:
        return f"{side['seconds']:.3f} s"
    return f"{side['requests_running']} running, {side['decode_tokens_per_second']:.0f} tok/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="*", type=Path)
    parser.add_argument("--date", default="undated")
    parser.add_argument("--gpu", default="gpu")
    parser.add_argument("--hardware", default="unknown")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    write_results([cell for report in args.reports for cell in read_cells(report)], args)
    write_table()


if __name__ == "__main__":
    main()
