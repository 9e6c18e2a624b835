"""Ideas for choosing the lazy layers, at 75 to 90 % lazy, in transformers on quality.py's questions.

    python -m loadtest.experiments.selection_ideas PROMPTS.json SAMPLES.jsonl OUT.json [--device cpu]

No engine. A prompt is prefilled with full attention; then the answer's tokens are forced through the model,
many choices of layers at once, each with its windows. Counted: answers whose every token (but the first,
which every choice computes with full attention) is the most likely one, and KL divergence from full attention
over them. tests/engine/selection_study.py has the scores that were tried at 50 to 80 %.

What is tried, each beside the scores as they are served:

- threshold: layers whose score is above one number for all prompts, by which as many stay full in the mean;
- again: the score is taken again from the last 32 queries with the chosen layers lazy, twice;
- windows: a quarter of the full layers is given up, and the layers next in rank get their tokens as windows;
- prior: the score times what a layer costs when it alone is lazy, from SAMPLES.jsonl;
- static, greedy: on SAMPLES.jsonl, layers made lazy one by one, each time the one that then costs least; and
  the score times that cost;
- peak: scores with the largest single weight that is discarded;
- question after: the choice is made before the question is seen;
- oracle: greedy on the prompt itself, for a few prompts: what a perfect choice would reach.

OUT.json has, per choice, answers, divergence and layers kept; the greedy lists are in it as configurations
for ``loadtest.experiments.quality --config``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import DynamicCache

from loadtest.experiments.offline import stamped
from loadtest.experiments.quality import KEYS, MODEL, SINKS
from loadtest.experiments.windowed_model import QUERIES, SCORES, SERVED, Bench
from lt_sglang.config import format_layers
from lt_sglang.demo.smollm2 import ensure_model
from lt_sglang.eval.calibrate import choose_layers, laziest
from lt_sglang.eval.items import HfTokenizer

STRIDED = 128
KEEPS = (8, 6, 4, 3)  # of 30: 73, 80, 87 and 90 % lazy
ANSWER_TOKENS = 7  # of a sample: a space, five digits, a full stop


@dataclass(frozen=True)
class Question:
    """prompt and answer as token ids; tokens: the cell it is counted in."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cell: str


def keep_top(score: Sequence[float], keep: int) -> tuple[int, ...]:
    """The lazy layers when the ``keep`` highest scores stay full."""
    return laziest([-value for value in score], keep)


def widened(bench: Bench, score: Sequence[float], keep: int, tokens: int) -> list[int]:
    """``windows``: a quarter of ``keep`` is given up for wider windows, at as many tokens in all."""
    given = max(1, round(keep / 4))
    order = sorted(range(bench.layers), key=lambda layer: -score[layer])
    windows = bench.windows(order[keep - given :])
    next_in_rank = order[keep - given : keep + given]
    spent = given * (tokens - SINKS - bench.recent)
    for layer in next_in_rank:
        windows[layer] = bench.recent + spent // len(next_in_rank)
    return windows


@dataclass
class Prior:
    """What samples say.

    single, step: KL by layer, in nats, when it alone is lazy, and when greedy made it lazy. order: greedy's.
    residual: mean residual error by layer. lists: lazy layers for each of KEEPS.
    """

    single: list[float]
    step: list[float]
    order: list[int]
    residual: list[float]
    lists: dict[str, list[tuple[int, ...]]]


def greedy(
    bench: Bench, cases: Sequence[tuple[DynamicCache, Sequence[int]]], keep: int
) -> tuple[list[int], list[list[float]]]:
    """Layers in the order in which they are made lazy; per step, the mean KL each layer would bring."""
    lazy: list[int] = []
    steps = []
    while len(lazy) < bench.layers - keep:
        left = [layer for layer in range(bench.layers) if layer not in lazy]
        windows = [bench.windows([*lazy, layer]) for layer in left]
        totals = [0.0] * len(left)
        for cache, ids in cases:
            for number, (_, kl) in enumerate(bench.tried(cache, ids, 0, windows)[1]):
                totals[number] += kl / len(cases)
        cost = [float("inf")] * bench.layers
        for layer, total in zip(left, totals, strict=True):
            cost[layer] = total
        steps.append(cost)
        lazy.append(min(left, key=lambda layer: cost[layer]))
    return lazy, steps


def prior_of(bench: Bench, samples: Sequence[Sequence[int]], keeps: Sequence[int]) -> Prior:
    """Calibrate; samples end in their answers."""
    cases, residuals, laziness = [], [], []
    for ids in samples:
        cache = DynamicCache()
        prompt = ids[:-ANSWER_TOKENS]
        seen = bench.observe(prompt, cache, range(len(prompt) - QUERIES, len(prompt)))
        residuals.append(SCORES["residual-error"](seen).tolist())
        laziness.append((-SCORES["error-mass"](seen)).tolist())
        cases.append((cache, ids[-ANSWER_TOKENS:]))
    order, steps = greedy(bench, cases, min(keeps))
    step = [0.0] * bench.layers
    highest = 0.0
    for layer, cost in zip(order, steps, strict=True):
        highest = max(highest, cost[layer])
        step[layer] = highest
    for layer in set(range(bench.layers)) - set(order):
        # Never made lazy: as the last choice says.
        step[layer] = max(steps[-1][layer], highest)
    lists = {
        "static, greedy": [tuple(sorted(order[: bench.layers - keep])) for keep in keeps],
        "static, counted": [choose_layers(laziness, keep).lazy_layers for keep in keeps],
    }
    mean = [statistics.fmean(values) for values in zip(*residuals, strict=True)]
    return Prior(steps[0], step, order, mean, lists)


def choices_of(
    bench: Bench, prior: Prior, question: Question, thresholds: dict[str, float]
) -> tuple[dict[str, list[int]], DynamicCache]:
    """Windows by name of the choice, and the prompt's full cache."""
    prompt = question.prompt
    cache = DynamicCache()
    seen = bench.observe(prompt, cache, range(len(prompt) - QUERIES, len(prompt)))
    scores = {name: score(seen).tolist() for name, score in SCORES.items()}
    residual = scores["residual-error"]
    relative = [value / mean for value, mean in zip(residual, prior.residual, strict=True)]
    scores["prior, residual error"] = [r * k for r, k in zip(relative, prior.single, strict=True)]
    scores["prior, residual error squared"] = [r**2 * k for r, k in zip(relative, prior.single, strict=True)]
    scores["greedy cost, times residual error"] = [r * k for r, k in zip(relative, prior.step, strict=True)]
    found: dict[str, list[int]] = {}
    for number, keep in enumerate(KEEPS):
        for name, values in scores.items():
            found[f"{name} {keep}"] = bench.windows(keep_top(values, keep))
        for name, lists in prior.lists.items():
            found[f"{name} {keep}"] = bench.windows(lists[number])
        for name in SERVED:
            limit = thresholds[f"{name} {keep}"]
            lazy = [layer for layer, value in enumerate(scores[name]) if value < limit]
            found[f"threshold, {name} {keep}"] = bench.windows(lazy)
            found[f"windows, {name} {keep}"] = widened(bench, scores[name], keep, len(prompt))
        windows = found[f"residual-error {keep}"]
        for _ in range(2):
            before = bench.copy(cache, len(prompt) - QUERIES)
            later = bench.observe(prompt[-QUERIES:], before, range(QUERIES), windows)
            windows = bench.windows(keep_top(SCORES["residual-error"](later).tolist(), keep))
        found[f"again, residual-error {keep}"] = windows
    return found, cache


def question_after(
    bench: Bench, prior: Prior, question: Question, asked: Sequence[int]
) -> tuple[dict[str, list[int]], DynamicCache]:
    """Choices made before the question; the cache ends before it too."""
    context = question.prompt[: -len(asked)]
    cache = DynamicCache()
    beyond = len(context) - bench.recent
    strided = [bench.recent + number * beyond // STRIDED for number in range(STRIDED)]
    last = list(range(len(context) - QUERIES, len(context)))
    seen_strided = bench.observe(context, cache, strided)
    again = bench.copy(cache, len(context) - QUERIES)
    seen_last = bench.observe(context[-QUERIES:], again, range(len(last)))
    found: dict[str, list[int]] = {}
    for number, keep in enumerate((15, *KEEPS)):
        for label, seen in (("last 32", seen_last), ("128 strided", seen_strided)):
            for name in SERVED:
                lazy = keep_top(SCORES[name](seen).tolist(), keep)
                found[f"question after, {name}, {label} {keep}"] = bench.windows(lazy)
        if number:
            for name, lists in prior.lists.items():
                found[f"question after, {name} {keep}"] = bench.windows(lists[number - 1])
    return found, cache


def questions_of(spec: dict[str, Any], tokenizer: HfTokenizer) -> list[tuple[Question, list[int]]]:
    """With the question's own tokens at the prompt's end. Every task and length by turns."""
    start = tokenizer.encode(" What is the pass key")
    cells: dict[str, list[tuple[Question, list[int]]]] = {}
    for key in spec["keys"]:
        prompt = key["prompt"]
        at = max(i for i in range(len(prompt) - len(start)) if prompt[i : i + len(start)] == start)
        cell = f"{key['task']} {key['cell']['tokens']}"
        question = Question(tuple(prompt), tuple(key["answers"][0]), cell)
        cells.setdefault(cell, []).append((question, prompt[at:]))
    return [one for together in zip(*cells.values(), strict=True) for one in together]


def thresholds_of(bench: Bench, questions: Sequence[Question]) -> dict[str, float]:
    """One number by score and keep, with which ``keep`` layers stay full in the mean over these prompts."""
    every: dict[str, list[float]] = {name: [] for name in SERVED}
    for question in questions:
        prompt = question.prompt
        seen = bench.observe(prompt, DynamicCache(), range(len(prompt) - QUERIES, len(prompt)))
        for name in SERVED:
            every[name] += SCORES[name](seen).tolist()
    found = {}
    for name, values in every.items():
        values.sort(reverse=True)
        for keep in KEEPS:
            found[f"{name} {keep}"] = values[keep * len(questions) - 1]
    return found


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per choice: of how many prompts, how many right, of full attention's how many; KL; layers kept."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for record in records for name in record["results"]):
        mine = [record for record in records if name in record["results"]]
        right = sum(record["results"][name][0] for record in mine)
        full = sum(record["full"] for record in mine)
        found[name] = {
            "prompts": len(mine),
            "full": full,
            "found": right,
            "ratio": right / max(full, 1),
            "kl": statistics.fmean(record["results"][name][1] for record in mine),
            "kept": statistics.fmean(record["results"][name][2] for record in mine),
        }
    return found


def main() -> None:
    """Calibrate, measure, write as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--every", type=int, default=1, help="measure every Nth question")
    parser.add_argument("--oracle-every", type=int, default=12, help="of the questions measured")
    parser.add_argument("--sample-count", type=int, default=16)
    parser.add_argument("--budget-s", type=float, default=3600)
    args = parser.parse_args()
    end = time.monotonic() + args.budget_s
    model = str(ensure_model())
    tokenizer = HfTokenizer(model)
    spec = json.loads(args.prompts.read_text())
    bench = Bench(model, args.device, spec["recent_tokens"])
    questions = questions_of(spec, tokenizer)[:: args.every]
    lines = args.samples.read_text().splitlines()[:: -(-16 // args.sample_count)]
    samples = [tokenizer.encode(json.loads(line)["text"]) for line in lines]
    start = time.perf_counter()
    prior = prior_of(bench, samples, KEEPS)
    report: dict[str, Any] = {
        **stamped("quality-ideas", f"{KEYS}, answers forced in transformers", model=MODEL),
        "calibration_seconds": round(time.perf_counter() - start, 1),
        "greedy_order": prior.order,
        "single_kl": prior.single,
        "configs": {
            f"{name.replace('static, ', 'static-')}-keep-{keep}": {"lazy_layers": format_layers(lazy)}
            for name, lists in prior.lists.items()
            for keep, lazy in zip(KEEPS, lists, strict=True)
        },
        "choices": {},
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"calibrated in {report['calibration_seconds']} s, greedy order {prior.order}", flush=True)
    thresholds = thresholds_of(bench, [question for question, _ in questions])
    print("thresholds", thresholds, flush=True)
    records = []
    for number, (question, asked) in enumerate(questions):
        if time.monotonic() > end:
            print(f"out of time after {number} of {len(questions)} questions", flush=True)
            break
        windows, cache = choices_of(bench, prior, question, thresholds)
        if number % args.oracle_every == 0:
            order, _ = greedy(bench, [(cache, question.answer)], min(KEEPS))
            windows |= {f"oracle {keep}": bench.windows(order[: bench.layers - keep]) for keep in KEEPS}
        full, results = bench.tried(cache, question.answer, 0, list(windows.values()))
        del cache
        kept = [sum(window == bench.everything for window in one) for one in windows.values()]
        told = {n: [*r, k] for n, r, k in zip(windows, results, kept, strict=True)}
        records.append({"full": full, "results": told, "cell": question.cell})
        later, cache = question_after(bench, prior, question, asked)
        ids = [*asked, *question.answer]
        full, results = bench.tried(cache, ids, len(asked) - 1, list(later.values()))
        del cache
        kept = [sum(window == bench.everything for window in one) for one in later.values()]
        told = {n: [*r, k] for n, r, k in zip(later, results, kept, strict=True)}
        records.append({"full": full, "results": told, "cell": question.cell})
        if number % 10 == 9 or number + 1 == len(questions):
            report["choices"] = summary(records)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            print(number + 1, len(questions), flush=True)
    report["choices"] = summary(records)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, entry in report["choices"].items():
        line = f"{entry['found']:3d} of {entry['full']:3d}  KL {entry['kl']:.4f}  kept {entry['kept']:.1f}"
        print(f"{name:58s} {line}")


if __name__ == "__main__":
    main()
