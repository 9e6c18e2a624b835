"""Turn reports of tests/gpu/run.py into dated result files and the table in loadtest/results/README.md.

    python loadtest/make_results.py REPORT.json [REPORT.json ...] --date 2026-11-21 --gpu h100 \\
        --hardware "NVIDIA H100 80GB HBM3" --commit SHA [--note TEXT]

A result file compares one cell of a lighttransfer engine with the same cell of a stock engine, or the errors
of log-probabilities of the two (parity), or gives the time that tests/gpu/identify.py measured for each score
of dynamic mode (pass its JSON like a report). The stock engine runs on SGLang's flashinfer backend unless the
file's name says otherwise; where the two come from different reports, its notes say so. `lt-sglang bench` and
`lt-sglang soak` write result files themselves. README.md and decode.png are made from all result files in the
folder, never from the reports; without reports, that is all this does.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lt_sglang.config import parse_layers
from lt_sglang.planner.roofline import decode_bound

STOCK = "stock_flashinfer"
RESULTS = Path(__file__).parent / "results"
# Of tests/gpu/run.py: the stock engine whose error bounds ours, and by how much it may be larger.
PARITY = {
    "graph": ("stock", "CUDA graphs, slots reused all the time"),
    "eager": ("stock", "no CUDA graphs"),
    "fp8": ("fp8_stock", "fp8 KV cache (e4m3), CUDA graphs, slots reused all the time"),
    "fa2_graph": ("fa2_stock", "FlashInfer's FA2 kernels for all attention, CUDA graphs, slots reused"),
    "fa2_eager": ("fa2_stock", "FlashInfer's FA2 kernels for all attention, no CUDA graphs"),
}
PARITY_BOUNDS = {"mean": 1.25, "max": 1.5}
# Of the Mistral-7B shape that tests/gpu/run.py measures.
LAYERS = 32
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
            return {"seconds": statistics.median(self.task["seconds"]), "repeats": self.task["seconds"]}
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
            if task["kind"] == "prefill" or task.get("steady"):
                yield Cell(path.stem, engine, entry["lighttransfer"], task)


def ratios(base: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """Ours over the baseline, above 1 being better."""
    if "seconds" in base:
        return {"prefill_speed": round(base["seconds"] / ours["seconds"], 4)}
    return {key: round(ours[key] / base[key], 4) for key in ("requests_running", "decode_tokens_per_second")}


def write_results(cells: list[Cell], args: argparse.Namespace) -> None:
    """One file for each lighttransfer cell and each stock engine that has its counterpart."""
    stock = [cell for cell in cells if cell.engine.startswith("stock_")]
    for cell in cells:
        bases = {base.engine: base for base in stock if base.kind == cell.kind}
        # A baseline of the same report if there is one.
        bases |= {b.engine: b for b in stock if b.kind == cell.kind and b.report == cell.report}
        for base in bases.values() if cell.config else ():
            write_result(cell, base, args)


def write_result(cell: Cell, base: Cell, args: argparse.Namespace) -> None:
    """One file: ``cell`` against ``base``."""
    assert cell.config is not None
    scenario = f"{cell.engine}-{cell.kind}".replace("_", "-")
    if base.engine != STOCK:
        scenario += f"-vs-{base.engine.removeprefix('stock_')}"
    notes = [args.note] if args.note else []
    if cell.report != base.report:
        notes.append("Baseline and lighttransfer were measured in two runs, on machines of the same kind.")
    config = {
        key: cell.config[key]
        for key in ("lazy_layers", "sink_tokens", "recent_tokens", "expected_tokens", "pools")
    }
    numbers = ("steady", "seconds", "requests", "output_tokens")
    measured = {key: value for key, value in cell.task.items() if key not in numbers}
    sent = {"requests": cell.task["requests"]} if "requests" in cell.task else {}
    sent_base = {"requests": base.task["requests"]} if "requests" in base.task else {}
    result = {
        "scenario": scenario,
        **_common(args),
        "workload": {"model": "Mistral-7B shape, dummy weights, bfloat16, tp 1", **measured},
        "baseline": {"engine": base.engine, **sent_base, **base.numbers()},
        "lighttransfer": {"config": config, **sent, **cell.numbers()},
        "ratio": ratios(base.numbers(), cell.numbers()),
        "notes": notes,
    }
    _write(args, scenario, result)


def write_parity(path: Path, args: argparse.Namespace) -> None:
    """One file for each way of running the lazy layers whose stock counterpart the report has."""
    found = json.loads(path.read_text()).get("parity", {})
    kernels = found.get("ragged_prefill_kernels", {})
    for label, (stock, what) in PARITY.items():
        if label not in found or stock not in found:
            continue
        base, ours = ({key: found[name][key] for key in ("mean", "p99", "max")} for name in (stock, label))
        ratio = {key: round(ours[key] / base[key], 4) for key in ("mean", "max")}
        scenario = f"parity-{label}".replace("_", "-")
        result = {
            "scenario": scenario,
            **_common(args),
            "workload": {
                "what": f"log-probabilities against the same model in float32: {what}",
                "model": "seeded Llama, 6 layers, 3 of them lazy, 4 + 252, bfloat16",
                "tokens": "11 prompts of 1 to 5000 tokens, 64 new tokens each",
            },
            "baseline": {"engine": stock, **base, "prefill_kernels": kernels.get(stock, [])},
            "lighttransfer": {**ours, "prefill_kernels": kernels.get(label, [])},
            "error_ratio": ratio,
            "within": ratio["mean"] <= PARITY_BOUNDS["mean"] and ratio["max"] <= PARITY_BOUNDS["max"],
            "notes": [],
        }
        _write(args, scenario, result)


def write_identify(path: Path, args: argparse.Namespace) -> None:
    """One file with every shape that tests/gpu/identify.py timed; does nothing for other reports."""
    given = json.loads(path.read_text())
    timed = [one for one in given.get("results", []) if one["us_per_layer"]]
    if not timed:
        return
    shapes = {one["shape"]["name"]: one["us_per_layer"] for one in timed}
    reference = "reference of lighttransfer"
    result = {
        "scenario": "identify",
        **_common(args),
        "versions": {"torch": given["torch"], "triton": given["triton"]},
        "workload": {
            "what": "GPU time of scoring one layer, microseconds; median of CUDA graph replays, cold caches",
            "shapes": [one["shape"] for one in timed],
        },
        "baseline": {
            "engine": "plain torch, lighttransfer",
            "us": {n: t[reference] for n, t in shapes.items()},
        },
        "lighttransfer": {"us": shapes},
        "largest_relative_error": {one["shape"]["name"]: one["error"] for one in given["results"]},
        "notes": [args.note] if args.note else [],
    }
    _write(args, "identify", result)


def _common(args: argparse.Namespace) -> dict[str, Any]:
    return {"hardware": args.hardware, "versions": VERSIONS, "commit": args.commit, "seed": 0}


def _write(args: argparse.Namespace, scenario: str, result: dict[str, Any]) -> None:
    path = RESULTS / f"{args.date}-{args.gpu}-{scenario}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def write_table() -> None:
    """README.md and the plot of the results folder, from its files."""
    rows = ["# Results", "", "Made by `python loadtest/make_results.py`; one file a row.", ""]
    rows += ["![decode ratios and their bounds](decode.png)", ""]
    rows += [
        "Measured / bound: lt-sglang plan's roofline for the same lengths and memory, where the file has it.",
        "",
        "| date, GPU, scenario | baseline | LightTransfer | ratio | measured / bound | notes |",
        "|---|---|---|---|---|---|",
    ]
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    for stem, result in results.items():
        if "ratio" not in result:
            continue
        base, ours = (_short(result[side]) for side in ("baseline", "lighttransfer"))
        ratio = ", ".join(f"{value:.2f}x {key.replace('_', ' ')}" for key, value in result["ratio"].items())
        reached = result.get("measured_over_bound", {})
        share = ", ".join(f"{value:.0%} {key.replace('_', ' ')}" for key, value in reached.items())
        rows.append(f"| {stem} | {base} | {ours} | {ratio} | {share} | {' '.join(result['notes'])} |")
    rows += [
        "",
        "## Parity",
        "",
        "Mean (largest) absolute difference of log-probabilities from the same model in float32: of stock",
        "SGLang in the same configuration from full attention, of LightTransfer from an explicit streaming",
        f"mask. Its error may be {PARITY_BOUNDS['mean']} times the baseline's in the mean and "
        f"{PARITY_BOUNDS['max']} times in the largest.",
        "",
        "| date, GPU, check | what | baseline | LightTransfer | ratio | within |",
        "|---|---|---|---|---|---|",
    ]
    for stem, result in results.items():
        if "error_ratio" not in result:
            continue
        base, ours = (
            f"{result[side]['mean']:.4f} ({result[side]['max']:.3f})"
            for side in ("baseline", "lighttransfer")
        )
        ratio = f"{result['error_ratio']['mean']:.2f}x ({result['error_ratio']['max']:.2f}x)"
        what = result["workload"]["what"].split(": ", 1)[1]
        rows.append(
            f"| {stem} | {what} | {base} | {ours} | {ratio} | {'yes' if result['within'] else 'no'} |"
        )
    rows += _identify_rows(results)
    rows += _alone_rows(results)
    plot(results)
    (RESULTS / "README.md").write_text("\n".join(rows) + "\n")


def _identify_rows(results: dict[str, Any]) -> list[str]:
    scores = ("lighttransfer", "residual-error", "discarded-mass", "squeeze")
    rows = [
        "",
        "## Identification",
        "",
        "GPU microseconds of scoring one layer in dynamic mode, kernels and projections included.",
        "",
        f"| date, GPU, shape | {' | '.join(scores)} | lighttransfer in plain torch |",
        "|---|" + "---|" * (len(scores) + 1),
    ]
    for stem, result in results.items():
        if result["scenario"] == "identify":
            for name, times in result["lighttransfer"]["us"].items():
                shown = " | ".join(f"{times[score]:.1f}" for score in scores)
                rows.append(f"| {stem}, {name} | {shown} | {result['baseline']['us'][name]:.1f} |")
    return rows


def _alone_rows(results: dict[str, Any]) -> list[str]:
    """Long runs, and scenarios that have no baseline."""
    rows = [
        "",
        "## Without a baseline",
        "",
        "Long runs (`lt-sglang soak`): the last sixth's throughput over the first's, and by how much memory",
        "grew from the fourth sixth to the last. Checks (`lt-sglang bench`, one side): the scenario's gates.",
        "",
        "| date, GPU, scenario | what | result | held | notes |",
        "|---|---|---|---|---|",
    ]
    for stem, result in results.items():
        if "soak" in result:
            soak = result["soak"]
            shown = f"{soak['last_over_first']:.3f}x, memory {soak['memory_growth']:+.1%}, "
            shown += f"{soak['summary']['completed']} answered, {soak['summary']['aborted']} aborted"
            held = soak["passed"]
        elif "baseline" not in result and "gates" in result:
            shown = f"{result['lighttransfer']['completed']} answered"
            held = {gate["metric"]: gate["passed"] for gate in result["gates"]}
        else:
            continue
        verdict = ", ".join(f"{name.replace('_', ' ')}: {'yes' if v else 'no'}" for name, v in held.items())
        rows.append(
            f"| {stem} | {result['workload']['about']} | {shown} | {verdict} | {' '.join(result['notes'])} |"
        )
    return rows


def plot(results: dict[str, Any]) -> None:
    """decode.png: measured decode ratios on GPUs against stock's flashinfer, and their bound by KV bytes."""
    shown: dict[str, tuple[float, float | None]] = {}
    for result in results.values():
        ratio = result.get("ratio", {}).get("decode_tokens_per_second")
        if ratio is None or "-vs-" in result["scenario"] or "CPU only" in result["hardware"]:
            continue
        # Files come in the order of their dates: the newest stays.
        shown[result["scenario"]] = ratio, _kv_bound(result)
    figure = Figure(figsize=(8, 0.6 + 0.42 * max(1, len(shown))), dpi=110, layout="constrained")
    axis = figure.subplots()
    names = sorted(shown, reverse=True)
    axis.barh(names, [shown[name][0] for name in names], color="tab:blue", label="measured")
    known = [(name, shown[name][1]) for name in names if shown[name][1] is not None]
    axis.plot([bound for _, bound in known], [name for name, _ in known], "k|", markersize=16, label="bound")
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.set_xlabel("decode tokens/s, LightTransfer over stock SGLang")
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(RESULTS / "decode.png")


def _kv_bound(result: dict[str, Any]) -> float | None:
    """The file's own bound; else, of a run that filled the memory, the one by KV bytes."""
    if "bound" in result:
        bound: float | None = result["bound"].get("decode_tokens_per_second")
        return bound
    workload, config = result["workload"], result["lighttransfer"]["config"]
    if result["ratio"]["requests_running"] == 1:
        return None
    tokens = workload["prompt_tokens"] + workload["new_tokens"] / 2
    share = len(parse_layers(config["lazy_layers"])) / LAYERS
    return decode_bound(tokens, share, config["sink_tokens"] + config["recent_tokens"])


def _short(side: dict[str, Any]) -> str:
    """Running requests and decode tok/s, or seconds of prefill; as much as the file has."""
    if "seconds" in side:
        return f"{side['seconds']:.3f} s"
    if "step_ms" in side:
        return f"{side['step_ms']:.2f} ms a step, ranks {side['rank_spread']:.1%} apart"
    parts = []
    if "requests_running" in side:
        parts.append(f"{side['requests_running']} running")
    if "decode_tokens_per_second" in side:
        parts.append(f"{side['decode_tokens_per_second']:.0f} tok/s")
    elif "median_ttft_ms" in side:
        parts.append(f"{side['median_ttft_ms'] / 1000:.3f} s to the first token")
    return ", ".join(parts) or f"{side['completed']} answered"


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
    for report in args.reports:
        write_parity(report, args)
        write_identify(report, args)
    write_table()


if __name__ == "__main__":
    main()
