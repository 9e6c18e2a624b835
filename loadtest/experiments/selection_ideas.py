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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loadtest.experiments.offline import stamped
from loadtest.experiments.quality import KEYS, MODEL, SINKS
from lt_sglang.config import format_layers
from lt_sglang.demo.smollm2 import ensure_model
from lt_sglang.eval.calibrate import choose_layers, laziest
from lt_sglang.eval.items import HfTokenizer

QUERIES, STRIDED = 32, 128
KEEPS = (8, 6, 4, 3)  # of 30: 73, 80, 87 and 90 % lazy
ANSWER_TOKENS = 7  # of a sample: a space, five digits, a full stop
AT_ONCE = 32
Seen = dict[str, torch.Tensor]

# Higher: keep it full. Tensors of ``Watcher``.
SCORES: dict[str, Callable[[Seen], torch.Tensor]] = {
    "residual-error": lambda s: (s["error"] / s["stream"]).amax(1),
    "error-mass": lambda s: (s["error"] / s["stream"]).amax(1) * (1 - s["mass"]).amax((1, 2)),
    "discarded-mass": lambda s: (1 - s["mass"]).amax((1, 2)),
    "peak": lambda s: s["peak"].amax((1, 2)),
    "peak, times residual error": lambda s: (s["error"] / s["stream"]).amax(1) * s["peak"].amax((1, 2)),
    "residual error, max squared by mean": lambda s: (
        (s["error"] / s["stream"]).amax(1) ** 2 / (s["error"] / s["stream"]).mean(1)
    ),
}
SERVED = ("residual-error", "error-mass")


@dataclass(frozen=True)
class Question:
    """prompt and answer as token ids; tokens: the cell it is counted in."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cell: str


class Bench:
    """The model in bfloat16; evidence in float32.

    recent: of a lazy layer. Windows are given as recent tokens by layer; ``everything`` is full attention.
    """

    everything = 1 << 30

    def __init__(self, model: str, device: str, recent: int) -> None:
        self.device, self.recent = device, recent
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self.model.to(device).eval()
        self.blocks = self.model.model.layers
        self.layers = len(self.blocks)
        self._windows: torch.Tensor | None = None  # [sets, layers]
        self._watch: Callable[..., None] | None = None
        for index, block in enumerate(self.blocks):
            block.self_attn.register_forward_pre_hook(self._masked(index), with_kwargs=True)
            block.self_attn.register_forward_hook(self._watched(index), with_kwargs=True)
            block.register_forward_pre_hook(self._entered(index), with_kwargs=True)
        self._streams: list[torch.Tensor] = []

    def windows(self, lazy: Collection[int]) -> list[int]:
        """Windows by layer of a set of lazy layers."""
        return [self.recent if layer in lazy else self.everything for layer in range(self.layers)]

    def _masked(self, index: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if self._windows is None:
                return args, kwargs
            rows = kwargs["hidden_states"].shape[1]
            past = kwargs["past_key_values"].layers[index].keys.shape[2]
            query = torch.arange(past, past + rows, device=self.device)[:, None]
            key = torch.arange(past + rows, device=self.device)[None, :]
            near = (query - key)[None] < self._windows[:, index, None, None]
            mask = (key <= query)[None] & ((key < SINKS)[None] | near)
            return args, {**kwargs, "attention_mask": mask[:, None]}

        return before

    def _entered(self, index: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if self._watch is not None:
                self._streams.append(args[0] if args else kwargs["hidden_states"])

        return before

    def _watched(self, index: int) -> Any:
        def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._watch is not None:
                self._watch(index, module, kwargs)

        return after

    @torch.inference_mode()
    def observe(
        self,
        ids: Sequence[int],
        cache: DynamicCache,
        rows: Sequence[int],
        windows: Sequence[int] | None = None,
    ) -> Seen:
        """Run ``ids`` after what ``cache`` holds; evidence of the queries ``rows``, counted within ``ids``.

        [layers, heads, rows] mass, peak; [layers, rows] error, stream. All are those of a layer with full
        attention against the same layer with its window, whatever ``windows`` says the run itself has.
        """
        past = cache.get_seq_length()
        end = past + len(ids)
        at = torch.tensor(list(rows), device=self.device)
        query_at, key_at = (at + past)[:, None], torch.arange(end, device=self.device)[None, :]
        # The last queries are held against the tokens that would stay, as in an engine; earlier ones
        # against their own windows.
        last = int(at[0]) + past >= end - QUERIES
        near = key_at >= end - self.recent if last else query_at - key_at < self.recent
        kept, causal = (key_at < SINKS) | near, key_at <= query_at
        found: dict[str, list[torch.Tensor]] = {"mass": [], "peak": [], "error": [], "stream": []}

        def watch(index: int, module: Any, kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"][:, at]
            heads = (1, len(at), -1, module.head_dim)
            query = module.q_proj(hidden).view(heads).transpose(1, 2)
            cos, sin = (part[:, at] for part in kwargs["position_embeddings"])
            query, _ = apply_rotary_pos_emb(query, query, cos, sin)
            layer = cache.layers[index]
            groups = query.shape[1] // layer.keys.shape[1]
            keys = layer.keys[0].float().repeat_interleave(groups, 0)
            values = layer.values[0].float().repeat_interleave(groups, 0)
            scores = query[0].float() @ keys.transpose(1, 2) * module.scaling
            weights = scores.masked_fill(~causal, float("-inf")).softmax(2)
            part = weights * kept
            mass = part.sum(2)
            lost = (weights - part / mass[..., None].clamp(min=1e-20)) @ values
            error = lost.transpose(0, 1).flatten(1) @ module.o_proj.weight.float().T
            found["mass"].append(mass)
            found["peak"].append((weights - part).amax(2))
            found["error"].append(error.norm(dim=1))
            found["stream"].append(self._streams[index][0, at].float().norm(dim=1))

        self._watch, self._streams = watch, []
        if windows is not None:
            self._windows = torch.tensor([list(windows)], device=self.device)
        try:
            ids_on = torch.tensor([list(ids)], device=self.device)
            self.model(ids_on, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            self._watch, self._windows, self._streams = None, None, []
        return {name: torch.stack(values).cpu() for name, values in found.items()}

    def copy(self, cache: DynamicCache, tokens: int, sets: int = 1) -> DynamicCache:
        """The first ``tokens`` positions, for ``sets`` sequences."""
        new = DynamicCache()
        for index, layer in enumerate(cache.layers):
            parts = (part[:, :, :tokens].expand(sets, -1, -1, -1) for part in (layer.keys, layer.values))
            new.update(*parts, index)
        return new

    @torch.inference_mode()
    def forced(
        self, cache: DynamicCache, ids: Sequence[int], start: int, windows: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Log-probabilities [sets, len(ids) - 1 - start, vocabulary] of what follows ids[start:-1]."""
        tokens = cache.get_seq_length()
        outs = []
        for first in range(0, len(windows), AT_ONCE):
            some = [list(one) for one in windows[first : first + AT_ONCE]]
            self._windows = torch.tensor(some, device=self.device)
            try:
                fed = torch.tensor([list(ids[:-1])] * len(some), device=self.device)
                logits = self.model(
                    fed,
                    past_key_values=self.copy(cache, tokens, len(some)),
                    use_cache=True,
                    logits_to_keep=len(ids) - 1 - start,
                ).logits
            finally:
                self._windows = None
            outs.append(logits.float().log_softmax(2))
        return torch.cat(outs)

    def tried(
        self, cache: DynamicCache, ids: Sequence[int], start: int, windows: Sequence[Sequence[int]]
    ) -> tuple[bool, list[tuple[bool, float]]]:
        """Is full attention right; and of each set: is it right, KL divergence in nats a position."""
        full = (self.everything,) * self.layers
        sets = list(dict.fromkeys([full, *map(tuple, windows)]))
        logs = self.forced(cache, ids, start, sets)
        target = torch.tensor(list(ids[start + 1 :]), device=self.device)
        right = (logs.argmax(2) == target).all(1).tolist()
        kl = (logs[0].exp() * (logs[0] - logs)).sum(2).mean(1).tolist()
        found = dict(zip(sets, zip(right, kl, strict=True), strict=True))
        return right[0], [found[tuple(one)] for one in windows]


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
