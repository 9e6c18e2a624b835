"""The table (README.md) and the plot (decode.png) of loadtest/results, from the files in it.

    python loadtest/make_results.py

`lt-sglang bench` and `lt-sglang soak` write such files; experiments write reports that are such files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lt_sglang.config import parse_layers
from lt_sglang.planner.shapes import CONFIGS

RESULTS = Path(__file__).parent / "results"
# How result files name a model that is served with dummy weights.
MODEL = re.compile(r"(?P<shape>\S+) shape, .*tp (?P<tp>\d+)")
PARITY_BOUNDS = {"mean": 1.25, "max": 1.5}
# Parts of scenario names.
VARIANTS = ("first-chunk", "staging", "two-windows", "batch")


def main() -> None:
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
        reached = result.get("measured_over_bound", {})
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
            for one in result["results"]:
                if times := one["us_per_layer"]:
                    shown = " | ".join(f"{times[score]:.1f}" for score in scores)
                    plain = times["reference of lighttransfer"]
                    rows.append(f"| {stem}, {one['shape']['name']} | {shown} | {plain:.1f} |")
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
            for name, one in result["lists"].items():
                every = ", ".join(f"{chunks}: {us:.0f}" for chunks, us in one["device"].items())
                figures = [f"{us:.0f}" for us in (one["host"], one["longest"], one["device"]["3"])]
                planning = one["planning, 32 layers"]
                rows.append(f"| {stem}, {name} | {' | '.join(figures)} | {every} | {planning:.1f} |")
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
    """decode.png: measured decode ratios on GPUs against stock SGLang, and their bounds, the largest first.

    One bar for each GPU, model, length and share of lazy layers that was measured with the memory full: the
    newest file, against stock's fa3 where that was measured.
    """
    shown: dict[str, tuple[str, float, float | None]] = {}
    # Files come in the order of their dates: the newest of a kind stays.
    for fa3 in (False, True):
        for stem, result in results.items():
            ratio = result.get("ratio", {}).get("decode_tokens_per_second")
            kind = _kind(stem, result) if ratio is not None else None
            if kind is not None and (result["baseline"]["engine"] == "stock_fa3") == fa3:
                bound = result.get("bound", {}).get("decode_tokens_per_second")
                backend = _baseline(result)
                label = f"{kind} (against {backend})"
                shown[kind + backend.partition(" and ")[2]] = label, ratio, bound
    rows = sorted(shown.values(), key=lambda row: -row[1])
    figure = Figure(figsize=(12, 1.0 + 0.36 * max(1, len(rows))), dpi=110, layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(range(len(rows)), [ratio for _, ratio, _ in rows], color="#8db8dd", label="measured")
    for place, (_, ratio, bound) in enumerate(rows):
        beside = max(ratio, bound or 0.0)
        axis.annotate(f"{ratio:.2f}x", (beside, place), (6, 0), textcoords="offset points", va="center")
    known = [(bound, place) for place, (_, _, bound) in enumerate(rows) if bound is not None]
    bounds, places = ([one[column] for one in known] for column in (0, 1))
    marks = axis.scatter(
        bounds,
        places,
        marker="|",
        color="black",
        s=350,
        linewidth=2,
        label="bound (lt-sglang plan's roofline)",
    )
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axis.invert_yaxis()
    axis.margins(x=0.17)
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.set_xlabel("decode tokens/s over stock SGLang's, memory full")
    figure.legend(handles=[bars, marks], loc="outside upper right", ncols=2)
    figure.savefig(RESULTS / "decode.png")


def _kind(stem: str, result: dict[str, Any]) -> str | None:
    """GPU, model, length and lazy layers of a bar; None of files that are no bar.

    No bars: a CPU's ratios, both sides with lazy layers, equal batches, shared prefixes, several lengths, and
    variants of dynamic mode that cut at the first chunk or stage less.
    """
    workload, ours = result["workload"], result["lighttransfer"]
    config = ours.get("config") or {}
    model, traffic = MODEL.match(workload.get("model", "")), workload.get("traffic", ())
    tokens = traffic[0].get("input") if len(traffic) == 1 else None
    shared = any(one.get("shared") or one.get("turns", 1) > 1 for one in traffic)
    variant = any(word in result["scenario"] for word in VARIANTS) or result["ratio"]["requests_running"] == 1
    stock = result["baseline"]["engine"].startswith("stock_") and "CPU only" not in result["hardware"]
    if not (model and stock and isinstance(tokens, int) and "lazy_layers" in config) or shared or variant:
        return None
    shape, tp = model["shape"].lower(), int(model["tp"])
    lazy, layers = len(parse_layers(config["lazy_layers"])), CONFIGS[shape]["num_hidden_layers"]
    gpu = stem[len("2026-01-02-") :].partition("-")[0]
    parts = [gpu, f"{shape} tp {tp}" if tp > 1 else shape, f"{tokens // 1024}K in"]
    output = traffic[0].get("output")
    parts += [f"{output // 1024}K out"] if isinstance(output, int) and output >= 1024 else []
    parts.append(f"{lazy} of {layers} lazy" + (", dynamic" if config.get("mode") == "dynamic" else ""))
    return ", ".join(parts)


def _baseline(result: dict[str, Any]) -> str:
    """What ours is compared with."""
    flags = (result["workload"].get("engine") or {}).get("baseline_flags", ())
    backend = result["baseline"]["engine"].removeprefix("stock_")
    return f"{backend}{' and DP attention' if '--enable-dp-attention' in flags else ''}"


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


if __name__ == "__main__":
    main()
