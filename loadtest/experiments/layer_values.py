"""Lists of lazy layers by Shapley value (arXiv 2410.13846, appendix C.5), by single layers, and greedily.

    python -m loadtest.experiments.layer_values OUT.json [--device cuda] [--trials 30] [--lengths 4096 8000]
        [--recent-tokens 1020] [--samples 16] [--pairs 32] [--seed 0] [--figure FILE.png]
    ... --device cpu --trials 8 --lengths 2000 --recent-tokens 496 --samples 4 --pairs 4 --candidates 8

What a set of lazy layers costs is what ``lt-sglang calibrate --greedy`` minimises: the KL divergence from
full attention over the last tokens of samples, whose answers lie there. Of that cost three values of a layer:

shapley: what the layer adds, the mean over random orders in which layers become lazy. Each order is followed
    by its reverse, so that what two layers cost together is split evenly between them whatever is drawn.
first half: the same, only of those times when the layer is in the order's first half, as in lists of half.
single: what the layer costs alone (single-layer ablation, as in BERTology); greedy's first step.

A list is the layers of least value. Beside them greedy's lists, layers counted over the samples by the
default score, quality.yaml's lists, and the scores of each prompt: what lists cost on samples of another
seed, and right answers, cut after the prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tqdm import tqdm

from loadtest.experiments.head_windows import HeadWindows, Kept, Prefilled
from loadtest.experiments.offline import stamped
from loadtest.experiments.quality import LISTS, SINKS, by_cell, counted, key_questions
from loadtest.experiments.razor_attention import arguments, ask
from lt_sglang.config import format_layers
from lt_sglang.demo.smollm2 import ensure_model
from lt_sglang.eval.calibrate import choose_layers, laziest
from lt_sglang.eval.greedy import Costs, Windowed, greedy_order, load
from lt_sglang.eval.items import HfTokenizer
from lt_sglang.eval.plots import require_matplotlib, save

COMPARED = 32
Cost = Callable[[Sequence[tuple[int, ...]]], Sequence[float]]


@dataclass(frozen=True)
class Values:
    """Of each layer: its Shapley value, that value's standard error, and the mean over first halves."""

    shapley: list[float]
    error: list[float]
    first_half: list[float]


def shapley(
    layers: int, cost: Cost, pairs: int, seed: int, progress: Callable[[range], Any] = iter
) -> Values:
    """From ``pairs`` random orders and their reverses; the cost of no lazy layer is 0."""
    rng = random.Random(seed)
    means: list[list[float]] = [[] for _ in range(layers)]
    early: list[list[float]] = [[] for _ in range(layers)]
    for _ in progress(range(pairs)):
        order = rng.sample(range(layers), layers)
        added: list[list[float]] = [[] for _ in range(layers)]
        for way in (order, order[::-1]):
            costs = cost([tuple(sorted(way[:end])) for end in range(1, layers + 1)])
            for place, (layer, before, after) in enumerate(zip(way, [0.0, *costs], costs, strict=False)):
                added[layer].append(after - before)
                if place < layers // 2:
                    early[layer].append(after - before)
        for layer, both in enumerate(added):
            means[layer].append(fmean(both))
    errors = [stdev(one) / pairs**0.5 if pairs > 1 else float("nan") for one in means]
    # With an odd number of layers the middle one of every order may be missing.
    return Values([fmean(one) for one in means], errors, [fmean(one or [0.0]) for one in early])


class Counting:
    """A cost that counts forward passes of a sample."""

    def __init__(self, costs: Costs) -> None:
        self._costs, self.passes = costs, 0

    def __call__(self, choices: Sequence[tuple[int, ...]]) -> list[float]:
        self.passes += len(choices) * self._costs.counted
        return self._costs(choices)

    def since(self) -> int:
        """Passes since this was last asked."""
        passes, self.passes = self.passes, 0
        return passes


def samples_of(tokenizer: HfTokenizer, count: int, recent: int, seed: int) -> list[list[int]]:
    """Questions of the same kind with their answers, ``count`` in all; other keys, places and fillers."""
    keys = key_questions(tokenizer, [2 * recent + 8], count // 2, recent, seed + 1000)
    return [key["prompt"] + key["answers"][0] + tokenizer.encode(".") for key in keys]


def lists_of(
    layers: int, cost: Counting, pairs: int, seed: int, candidates: int | None = None
) -> tuple[dict[str, Callable[[int], tuple[int, ...]]], dict[str, Any]]:
    """Lists by name, each of how many layers stay full; and their values and passes for the report."""
    single = cost([(layer,) for layer in range(layers)])
    passes = {"single": cost.since()}
    values = shapley(layers, cost, pairs, seed, lambda steps: tqdm(steps, desc="pairs of orders"))
    passes |= {"shapley": cost.since()}
    greedy = greedy_order(layers, cost, lambda steps: tqdm(steps, desc="greedy"), candidates)
    passes |= {"greedy": cost.since()}
    by_value = {"shapley": values.shapley, "first half": values.first_half, "single": single}
    named = {name: partial(least, one) for name, one in by_value.items()}
    report = {
        "values": {**by_value, "shapley_error": values.error},
        "greedy": {"order": greedy.order, "divergence": greedy.divergence},
        "passes": passes,
    }
    return named | {"greedy": greedy.lazy_layers}, report


def least(values: Sequence[float], keep: int) -> tuple[int, ...]:
    """All layers but the ``keep`` of the highest value."""
    return laziest([-value for value in values], keep)


def draw(values: dict[str, list[float]], path: Path) -> None:
    """Values by layer."""
    pyplot = require_matplotlib()
    figure, axis = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    layers = range(len(values["single"]))
    axis.errorbar(layers, values["shapley"], values["shapley_error"], fmt="o-", ms=4, label="Shapley value")
    axis.plot(layers, values["first half"], "s-", ms=4, label="first half of an order")
    axis.plot(layers, values["single"], "^-", ms=4, label="alone")
    axis.set(xlabel="layer", ylabel="nats a position")
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.legend()
    save(pyplot, figure, path)


def main() -> None:
    """See the head of this file."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=32, help="random orders, each with its reverse")
    parser.add_argument("--candidates", type=int, help="of greedy, as in lt-sglang calibrate")
    parser.add_argument("--keeps", type=int, nargs="+", default=[15, 8, 4], help="full layers")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    folder, recent = ensure_model(), args.recent_tokens
    tokenizer, raw = HfTokenizer(str(folder)), load(str(folder), args.device)
    windowed = Windowed(raw, SINKS, recent)
    samples, others = (samples_of(tokenizer, args.samples, recent, args.seed + more) for more in (0, 1000))
    what = (
        f"passkey and 3-key, {args.trials} prompts each at {' and '.join(map(str, args.lengths))} tokens; "
        f"{args.samples} samples of about {len(samples[0])} tokens"
    )
    title = stamped("quality-layer-values", what, model=f"{folder.name}, {raw.dtype}, {SINKS} + {recent}")
    cost = Counting(Costs(windowed, samples, COMPARED, SINKS + recent))
    lists, report = lists_of(windowed.layers, cost, args.pairs, args.seed, args.candidates)
    held_out = Costs(windowed, others, COMPARED, SINKS + recent)

    model = HeadWindows(raw, SINKS, recent)
    scores = [model.prefill(ids).scores["residual-error"] for ids in samples]
    report["passes"]["counted"] = len(samples)
    lists["counted"] = lambda keep: choose_layers(scores, keep).lazy_layers
    chosen = {f"{name}, {keep} full": one(keep) for keep in args.keeps for name, one in lists.items()} | {
        f"quality.yaml, {keep} full": LISTS[keep] for keep in args.keeps if keep in LISTS
    }
    keys = key_questions(tokenizer, args.lengths, args.trials, recent, args.seed)

    def ways_of(prompt: Prefilled) -> dict[str, Kept]:
        by_prompt = {
            f"{name}, {keep} full": laziest(one, keep)
            for keep in args.keeps
            for name, one in prompt.scores.items()
        }
        named = {"full": (), **chosen, **by_prompt}
        return {name: model.layers_kept(lazy) for name, lazy in named.items()}

    hits, _ = ask(model, keys, ways_of)
    raw.set_attn_implementation("sdpa")
    costs = dict(zip(chosen, held_out(list(chosen.values())), strict=True))

    methods = {
        name: {
            **(
                {"lazy_layers": format_layers(chosen[name]), "held_out_kl": costs[name]}
                if name in chosen
                else {}
            ),
            "cells": by_cell(keys, mine),
            **counted(mine, hits["full"]),
        }
        for name, mine in hits.items()
    }
    report = {**title, "seed": args.seed, **report, "methods": methods}
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.figure:
        draw(report["values"], args.figure)
    print(report["passes"])
    for name, row in methods.items():
        print(f"{name:28s} {row['found']} of {row['of']}", row.get("held_out_kl"), row.get("lazy_layers"))


if __name__ == "__main__":
    main()
