"""Turn reports of tests/gpu/run.py into dated result files and the table in loadtest/results/README.md.

    python loadtest/make_results.py REPORT.json [REPORT.json ...] --date 2026-11-21 --gpu h100 \\
        --hardware "NVIDIA H100 80GB HBM3" --commit SHA [--note TEXT]

A result file compares one cell of a lighttransfer engine with the same cell of a stock engine, or of dynamic
mode with static mode (-vs-static), or the errors of log-probabilities of the two (parity), or gives the time
that tests/gpu/identify.py measured for each score of dynamic mode, or tests/gpu/decode_plan.py for each plan
(pass their JSON like a report). The stock engine runs on SGLang's flashinfer backend unless the
file's name says otherwise; where the two come from different reports, its notes say so. `lt-sglang bench` and
`lt-sglang soak` write result files themselves. README.md and decode.png are made from all result files in the
folder, never from the reports; without reports, that is all this does.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lt_sglang.bench.file_bounds import MODEL, roofline
from lt_sglang.bench.shapes import SHAPES
from lt_sglang.config import parse_layers

STOCK = "stock_flashinfer"
RESULTS = Path(__file__).parent / "results"
# Of tests/gpu/run.py: the stock engine whose error bounds ours, and by how much it may be larger.
PARITY = {
    "graph": ("stock", "CUDA graphs, slots reused all the time"),
    "eager": ("stock", "no CUDA graphs"),
    "eager_hits": ("stock_hits", "prompts with cached prefixes, no CUDA graphs"),
    "fp8": ("fp8_stock", "fp8 KV cache (e4m3), CUDA graphs, slots reused all the time"),
    "fa2_graph": ("fa2_stock", "FlashInfer's FA2 kernels for all attention, CUDA graphs, slots reused"),
    "fa2_eager": ("fa2_stock", "FlashInfer's FA2 kernels for all attention, no CUDA graphs"),
    "fa2_eager_hits": ("fa2_stock_hits", "FlashInfer's FA2 kernels, prompts with cached prefixes"),
}
PARITY_BOUNDS = {"mean": 1.25, "max": 1.5}
VERSIONS = {"sglang": "0.5.23", "torch": "2.14.1", "flashinfer": "0.7.2", "triton": "3.8.0"}


@dataclass(frozen=True)
class Cell:
    """One measured cell: which report and engine it comes from, its task, its numbers."""

    report: str
    engine: str
    arguments: dict[str, Any]
    config: dict[str, Any] | None
    task: dict[str, Any]

    @property
    def model(self) -> str:
        """Its shape and how it runs."""
        shape = Path(self.arguments["model_path"]).name.removeprefix("lt-")
        return f"{shape} shape, dummy weights, bfloat16, tp {self.arguments.get('tp_size', 1)}"

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
                yield Cell(str(path), engine, entry["engine"], entry["lighttransfer"], task)


def ratios(base: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """Ours over the baseline, above 1 being better."""
    if "seconds" in base:
        return {"prefill_speed": round(base["seconds"] / ours["seconds"], 4)}
    return {key: round(ours[key] / base[key], 4) for key in ("requests_running", "decode_tokens_per_second")}


def write_results(cells: list[Cell], args: argparse.Namespace) -> None:
    """One file for each lighttransfer cell and each stock engine that has its counterpart."""
    for cell in cells:
        others = [base for base in cells if cell.config and comparable(base, cell)]
        bases = {base.engine: base for base in others}
        # A baseline of the same report if there is one.
        bases |= {base.engine: base for base in others if base.report == cell.report}
        for base in bases.values():
            write_result(cell, base, args)


def comparable(base: Cell, cell: Cell) -> bool:
    """Whether ``base`` is a baseline of ``cell``: the same work, and where it fills the memory, both do."""
    stock = base.engine.startswith("stock_")
    static = base.engine.startswith("lt_") and cell.engine.startswith("dynamic_")
    if not (stock or static) or base.kind != cell.kind or base.model != cell.model:
        return False
    if cell.task["kind"] == "prefill" or base.task["requests"] == cell.task["requests"]:
        return True
    return stock and cell.task["steady"]["running"] > base.task["steady"]["running"]


def write_result(cell: Cell, base: Cell, args: argparse.Namespace) -> None:
    """One file: ``cell`` against ``base``."""
    assert cell.config is not None
    scenario = f"{cell.engine}-{cell.kind}".replace("_", "-")
    if cell.arguments.get("tp_size", 1) > 1:
        scenario = f"{Path(cell.arguments['model_path']).name}-tp{cell.arguments['tp_size']}-{scenario}"
    if base.engine != STOCK:
        other = "static" if base.engine.startswith("lt_") else base.engine.removeprefix("stock_")
        scenario += f"-vs-{other}"
    notes = [args.note] if args.note else []
    if cell.report != base.report and not args.together:
        notes.append("Baseline and lighttransfer were measured in two runs, on machines of the same kind.")
    if cell.task["kind"] != "prefill" and base.engine.startswith("stock_"):
        full = base.task["steady"]["running"] < base.task["requests"]
        if full and cell.task["steady"]["running"] == cell.task["requests"]:
            notes.append("All requests sent to LightTransfer ran at once: its memory would hold more.")
    keys = ("mode", "lazy_layers", "sink_tokens", "recent_tokens", "expected_tokens", "pools")
    config = {key: cell.config[key] for key in (*keys, "keep", "score", "decide") if key in cell.config}
    numbers = ("steady", "seconds", "requests", "output_tokens")
    measured = {key: value for key, value in cell.task.items() if key not in numbers}
    sent = {"requests": cell.task["requests"]} if "requests" in cell.task else {}
    sent_base = {"requests": base.task["requests"]} if "requests" in base.task else {}
    result = {
        "scenario": scenario,
        **_common(args),
        "workload": {"model": cell.model, **measured},
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
    dynamic = any("choices_equal" in one for one in found.values())
    for label, (stock, what) in PARITY.items():
        if label not in found or stock not in found:
            continue
        choices = ("choices_equal", "choices_within_noise", "choices_wrong", "largest_score_error")
        keys = ("mean", "p99", "max", "hits", *choices)
        base, ours = (
            {key: found[name][key] for key in keys if key in found[name]} for name in (stock, label)
        )
        ratio = {key: round(ours[key] / base[key], 4) for key in ("mean", "max")}
        scenario = "-".join(["parity", *(["dynamic"] if dynamic else []), label.replace("_", "-")])
        if args.tp > 1:
            scenario, what = f"{scenario}-tp{args.tp}", f"{what}, tp {args.tp}"
        if dynamic:
            what = f"dynamic mode, {what}; requests of more than sink + recent tokens choose their layers"
        result = {
            "scenario": scenario,
            **_common(args),
            "workload": {
                "what": f"log-probabilities against the same model in float32: {what}",
                "model": "seeded Llama, 6 layers, 3 of them lazy, 4 + 252, bfloat16",
                "tokens": "11 prompts of 1 to 5000 tokens, 64 new tokens each",
            },
            "baseline": {
                "engine": stock,
                **base,
                "prefill_kernels": kernels.get(stock, []),
            },
            "lighttransfer": {**ours, "prefill_kernels": kernels.get(label, [])},
            "error_ratio": ratio,
            "within": ratio["mean"] <= PARITY_BOUNDS["mean"]
            and ratio["max"] <= PARITY_BOUNDS["max"]
            and not ours.get("choices_wrong"),
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


def write_decode_plan(path: Path, args: argparse.Namespace) -> None:
    """One file with every case that tests/gpu/decode_plan.py timed; does nothing for other reports."""
    cases = {name: one for name, one in json.loads(path.read_text()).items() if "longest" in one}
    if not cases:
        return
    result = {
        "scenario": "decode-plan",
        **_common(args),
        "workload": {
            "what": "microseconds of decode attention in one layer, 32 query and 8 KV heads of 128, bfloat16",
            "lists": list(cases),
        },
        "baseline": {
            "engine": "FlashInfer's plan on the host: of the lists; of lists as long as the longest",
            "us": {name: [one["host"], one["longest"]] for name, one in cases.items()},
        },
        "lighttransfer": {
            "us_by_chunks_a_place": {name: one["device"] for name, one in cases.items()},
            "us_planning_32_layers": {name: one["planning, 32 layers"] for name, one in cases.items()},
        },
        "largest_difference": max(one["difference"] for one in cases.values()),
        "notes": [args.note] if args.note else [],
    }
    _write(args, "decode-plan", result)


def _common(args: argparse.Namespace) -> dict[str, Any]:
    return {"hardware": args.hardware, "versions": VERSIONS, "commit": args.commit, "seed": 0}


def _write(args: argparse.Namespace, scenario: str, result: dict[str, Any]) -> None:
    path = RESULTS / f"{args.date}-{args.gpu}-{scenario}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def write_table() -> None:
    """README.md and the plot of the results folder, from its files."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    rows = ["# Results", "", "Made by `python loadtest/make_results.py`; one file a row.", ""]
    rows += ["![decode ratios and their bounds](decode.png)", ""]
    for section in (_ratio_rows, _parity_rows, _identify_rows, _decode_plan_rows, _alone_rows, _other_rows):
        rows += section(results)
    plot(results)
    (RESULTS / "README.md").write_text("\n".join(rows) + "\n")


def _other_rows(results: dict[str, Any]) -> list[str]:
    """Files of one command each, which documents quote."""
    rows = ["", "## Others", "", "| file | command | commit |", "|---|---|---|"]
    for stem, result in results.items():
        if "command" in result and "ratio" not in result:
            rows.append(f"| [{stem}]({stem}.json) | `{result['command']}` | {result['commit']} |")
    return rows


def _ratio_rows(results: dict[str, Any]) -> list[str]:
    rows = [
        "Measured / bound: lt-sglang plan's roofline for the same lengths, requests and memory; prefill's is",
        "for equal kernels, so a comparison with a slower backend passes it.",
        "",
        "| date, GPU, scenario | baseline | LightTransfer | ratio | measured / bound | notes |",
        "|---|---|---|---|---|---|",
    ]
    for stem, result in results.items():
        if "ratio" not in result:
            continue
        base, ours = (_short(result[side]) for side in ("baseline", "lighttransfer"))
        ratio = ", ".join(f"{value:.2f}x {key.replace('_', ' ')}" for key, value in result["ratio"].items())
        bounds = _bounds(result)
        reached = {key: value / bounds[key] for key, value in result["ratio"].items() if key in bounds}
        share = ", ".join(f"{value:.0%} {key.replace('_', ' ')}" for key, value in reached.items())
        rows.append(f"| {stem} | {base} | {ours} | {ratio} | {share} | {' '.join(result['notes'])} |")
    return rows


def _parity_rows(results: dict[str, Any]) -> list[str]:
    rows = [
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
    return rows


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


def _decode_plan_rows(results: dict[str, Any]) -> list[str]:
    rows = [
        "",
        "## Decode plans",
        "",
        "GPU microseconds of decode attention in one layer under a plan made on the device (by chunks a",
        "place on the GPU; the package uses 3), and under FlashInfer's, made on the host for the same lists",
        "or for lists as long as the longest.",
        "",
        "| date, GPU, lists | FlashInfer's | of the longest | ours | by chunks a place | planning 32 |",
        "|---|---|---|---|---|---|",
    ]
    for stem, result in results.items():
        if result["scenario"] == "decode-plan":
            ours = result["lighttransfer"]
            for name, (host, longest) in result["baseline"]["us"].items():
                by = ours["us_by_chunks_a_place"][name]
                every = ", ".join(f"{chunks}: {us:.0f}" for chunks, us in by.items())
                planning = ours["us_planning_32_layers"][name]
                figures = f"{host:.0f} | {longest:.0f} | {by['3']:.0f} | {every} | {planning:.1f}"
                rows.append(f"| {stem}, {name} | {figures} |")
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
    """decode.png: measured decode ratios on GPUs against stock's fa3, else flashinfer, and their bounds."""
    shown: dict[str, tuple[str, float, float | None]] = {}
    # Files come in the order of their dates: the newest of a GPU and scenario stays.
    for suffix in ("", "-vs-fa3"):
        for stem, result in results.items():
            ratio = result.get("ratio", {}).get("decode_tokens_per_second")
            other = result["scenario"].partition("-vs-")[1:]
            if ratio is None or "".join(other) != suffix or "CPU only" in result["hardware"]:
                continue
            name = stem[len("2026-01-02-") :].removesuffix(suffix)
            label = f"{_label(name, result)}, {_baseline(result)}"
            shown[name] = label, ratio, _bounds(result).get("decode_tokens_per_second")
    labels = Counter(label for label, _, _ in shown.values())
    rows = [
        (f"{label}: {name.partition('-')[2]}" if labels[label] > 1 else label, ratio, bound)
        for name, (label, ratio, bound) in sorted(shown.items())
    ]
    figure = Figure(figsize=(11, 1.0 + 0.36 * max(1, len(rows))), dpi=110, layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(range(len(rows)), [ratio for _, ratio, _ in rows], color="#8db8dd", label="measured")
    for place, (_, ratio, bound) in enumerate(rows):
        beside = max(ratio, bound or 0.0)
        axis.annotate(f"{ratio:.2f}x", (beside, place), (6, 0), textcoords="offset points", va="center")
    known = [(bound, place) for place, (_, _, bound) in enumerate(rows) if bound is not None]
    bounds, places = ([one[column] for one in known] for column in (0, 1))
    marks = axis.scatter(bounds, places, marker="|", color="black", s=350, linewidth=2, label="bound")
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axis.invert_yaxis()
    axis.margins(x=0.17)
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.set_xlabel("decode tokens/s over that of stock SGLang (backend named)")
    figure.legend(handles=[bars, marks], loc="outside upper right", ncols=2)
    figure.savefig(RESULTS / "decode.png")


def _label(name: str, result: dict[str, Any]) -> str:
    """GPU, model, length and lazy layers of a row in the plot; ``name`` where the file does not have them."""
    workload, config = result["workload"], result["lighttransfer"].get("config") or {}
    model = MODEL.match(workload.get("model", ""))
    tokens, traffic = workload.get("prompt_tokens"), workload.get("traffic", ())
    if tokens is None and len(traffic) == 1:
        tokens = traffic[0].get("input")
    shared = any(one.get("shared") or one.get("turns", 1) > 1 for one in traffic)
    if shared or not (model and isinstance(tokens, int) and "lazy_layers" in config):
        return name
    shape, tp = model["shape"].lower(), int(model["tp"])
    lazy, layers = len(parse_layers(config["lazy_layers"])), SHAPES[shape]["num_hidden_layers"]
    parts = [name.partition("-")[0], f"{shape} tp {tp}" if tp > 1 else shape, f"{tokens // 1024}K"]
    parts.append(f"{lazy} of {layers} lazy" + (", dynamic" if config.get("mode") == "dynamic" else ""))
    if result["ratio"].get("requests_running") == 1:
        parts.append(f"batch {result['lighttransfer']['requests_running']}")
    return ", ".join(parts)


def _baseline(result: dict[str, Any]) -> str:
    """What ours is compared with."""
    flags = (result["workload"].get("engine") or {}).get("baseline_flags", ())
    backend = result["baseline"]["engine"].removeprefix("stock_")
    return f"{backend}{' and DP attention' if '--enable-dp-attention' in flags else ''}"


def _bounds(result: dict[str, Any]) -> dict[str, float]:
    """The file's own bounds; of a file without them, the roofline."""
    own: dict[str, float] | None = result.get("bound")
    return roofline(result) if own is None else own


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
    parser.add_argument("--tp", type=int, default=1, help="of a report of parity")
    parser.add_argument(
        "--together", action="store_true", help="the reports are of one run, each on GPUs of its own"
    )
    args = parser.parse_args()
    write_results([cell for report in args.reports for cell in read_cells(report)], args)
    for report in args.reports:
        write_parity(report, args)
        write_identify(report, args)
        write_decode_plan(report, args)
    write_table()


if __name__ == "__main__":
    main()
