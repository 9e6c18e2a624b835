"""The tables of loadtest/results/README.md and README's plot, from the files in loadtest/results.

    python -m loadtest.make_results

`lt-sglang bench` and `lt-sglang soak` write such files; experiments write reports that are such files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loadtest import readme_figure

RESULTS = Path(__file__).parent / "results"
PAGE = """\
# Results

Made by `python -m loadtest.make_results`; one file a row.

![decode ratios and their bounds](../../docs/figures/decode.svg)

Measured / bound: lt-sglang plan's roofline for the same lengths, requests and memory; prefill's is
for equal kernels, so a comparison with a slower backend passes it.

| date, GPU, scenario | baseline | LightTransfer | ratio | measured / bound | notes |
|---|---|---|---|---|---|
{ratios}

## Parity

Mean (largest) absolute difference of log-probabilities from the same model in float32: of stock
SGLang in the same configuration from full attention, of LightTransfer from an explicit streaming
mask. Its error may be 1.25 times the baseline's in the mean and 1.5 times in the largest.

| date, GPU, check | what | baseline | LightTransfer | ratio | within |
|---|---|---|---|---|---|
{parity}

## Identification

GPU microseconds of scoring one layer in dynamic mode, kernels and projections included.

| date, GPU, shape | lighttransfer | residual-error | discarded-mass | squeeze | the first in plain torch |
|---|---|---|---|---|---|
{identification}

## Decode plans

GPU microseconds of decode attention in one layer under a plan made on the device (by chunks a
place on the GPU, and by rounds into which lists of one length may be cut; the package uses 3 and, for
lists of 4,096 tokens and more, 16), and under FlashInfer's, made on the host for the same lists or for
lists as long as the longest.

| date, GPU, lists | FlashInfer's | of the longest | ours | by limits | planning 32 |
|---|---|---|---|---|---|
{decode_plans}

## Without a baseline

Long runs (`lt-sglang soak`): the last sixth's throughput over the first's, and by how much memory
grew from the fourth sixth to the last. Checks (`lt-sglang bench`, one side): the scenario's gates.

| date, GPU, scenario | what | result | held | notes |
|---|---|---|---|---|
{alone}

## Others

Files of one command each, which documents quote.

| file | command | commit |
|---|---|---|
{others}
"""
Cells = Iterator[tuple[str, ...]]


def main() -> None:
    """README.md of the results folder, and README's plot."""
    (RESULTS / "README.md").write_text(page())
    readme_figure.FILE.write_text(readme_figure.svg())


def page() -> str:
    """README.md of the results folder."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}

    def rows(of: Callable[[str, dict[str, Any]], Cells]) -> str:
        found = (cells for stem, result in results.items() for cells in of(stem, result))
        return "\n".join(f"| {' | '.join(cells)} |" for cells in found)

    return PAGE.format(
        ratios=rows(_ratios),
        parity=rows(_parity),
        identification=rows(_identification),
        decode_plans=rows(_decode_plans),
        alone=rows(_alone),
        others=rows(_others),
    )


def _ratios(stem: str, result: dict[str, Any]) -> Cells:
    if "ratio" in result:
        ratio = ", ".join(f"{value:.2f}x {name.replace('_', ' ')}" for name, value in result["ratio"].items())
        reached = result.get("measured_over_bound", {})
        share = ", ".join(f"{value:.0%} {name.replace('_', ' ')}" for name, value in reached.items())
        sides = _short(result["baseline"]), _short(result["lighttransfer"])
        yield stem, *sides, ratio, share, " ".join(result["notes"])


def _parity(stem: str, result: dict[str, Any]) -> Cells:
    if "error_ratio" in result:
        base, ours = (
            f"{result[side]['mean']:.4f} ({result[side]['max']:.3f})"
            for side in ("baseline", "lighttransfer")
        )
        ratio = f"{result['error_ratio']['mean']:.2f}x ({result['error_ratio']['max']:.2f}x)"
        what = result["workload"]["what"].split(": ", 1)[1]
        yield stem, what, base, ours, ratio, "yes" if result["within"] else "no"


def _identification(stem: str, result: dict[str, Any]) -> Cells:
    scores = ("lighttransfer", "residual-error", "discarded-mass", "squeeze", "reference of lighttransfer")
    for one in result["results"] if result["scenario"] == "identify" else ():
        if times := one["us_per_layer"]:
            shown = [f"{times[score]:.1f}" for score in scores]
            yield f"{stem}, {one['shape']['name']}", *shown


def _decode_plans(stem: str, result: dict[str, Any]) -> Cells:
    for name, one in result["lists"].items() if result["scenario"] == "decode-plan" else ():
        every = ", ".join(f"{chunks}: {us:.0f}" for chunks, us in one["device"].items())
        ours = one["device"].get("3, 16 rounds") or one["device"]["3"]
        figures = [f"{us:.0f}" for us in (one["host"], one["longest"], ours)]
        yield f"{stem}, {name}", *figures, every, f"{one['planning, 32 layers']:.1f}"


def _alone(stem: str, result: dict[str, Any]) -> Cells:
    if soak := result.get("soak"):
        shown = f"{soak['last_over_first']:.3f}x, memory {soak['memory_growth']:+.1%}, "
        shown += f"{soak['summary']['completed']} answered, {soak['summary']['aborted']} aborted"
        held = soak["passed"]
    elif "baseline" not in result and "gates" in result:
        shown = f"{result['lighttransfer']['completed']} answered"
        held = {gate["metric"]: gate["passed"] for gate in result["gates"]}
    else:
        return
    verdict = ", ".join(f"{name.replace('_', ' ')}: {'yes' if v else 'no'}" for name, v in held.items())
    yield stem, result["workload"]["about"], shown, verdict, " ".join(result["notes"])


def _others(stem: str, result: dict[str, Any]) -> Cells:
    if "command" in result and "ratio" not in result and "gates" not in result:
        yield f"[{stem}]({stem}.json)", f"`{result['command']}`", result["commit"]


def _short(side: dict[str, Any]) -> str:
    """Running requests, decode tok/s and retractions, or seconds of prefill; as much as the file has."""
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
    if side.get("retractions"):
        parts.append(f"{side['retractions']} retracted")
    return ", ".join(parts) or f"{side['completed']} answered"


if __name__ == "__main__":
    main()
