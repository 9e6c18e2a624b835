"""RazorAttention (arXiv 2407.15891) beside lazy layers at the same memory, on quality.py's questions.

    python -m loadtest.experiments.razor_attention OUT.json [--device cuda] [--trials 30]
        [--lengths 4096 8000] [--recent-tokens 1020] [--period 2000] [--seed 0]
    ... --device cpu --trials 12 --lengths 2000 --recent-tokens 496 --period 500

It keeps the whole cache of the heads that retrieve, and sink + recent tokens with one compensation token of
all others. Written from the paper: a random sequence is repeated, without any data. A head's echo score is
the attention of a token to its earlier occurrences, its induction score that to the tokens behind them. One
head in 15 is kept for the first, the others for the second, as in the paper (1 % and 14 % of the heads).
Heads that share K and V are kept together, by the largest score among them. The paper's window is a fifth of
the prompt; here it is that of lazy layers, and as many KV heads stay full as P full layers have.

Accuracy only, in transformers, greedily, after a prefill with full attention. Beside it lists and scores of
lazy layers, and KV heads drawn at random.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from loadtest.experiments.head_windows import HeadWindows, Kept, Prefilled, causal_weights
from loadtest.experiments.offline import stamped
from loadtest.experiments.quality import LISTS, SINKS, by_cell, counted, found, key_questions
from lt_sglang.demo.smollm2 import ensure_model
from lt_sglang.eval.calibrate import laziest
from lt_sglang.eval.items import HfTokenizer

REPEATS, CHUNK = 4, 256
ECHO_HEADS = 15  # one retained head in so many is an echo head


def retrieval_scores(model: HeadWindows, period: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Echo and induction scores [layers, KV heads], the largest of the query heads that share K and V."""
    drawn = torch.Generator().manual_seed(seed)
    once = torch.randperm(model.model.config.vocab_size, generator=drawn)[:period]
    echo, induction = (torch.zeros(model.layers, model.kv_heads) for _ in range(2))

    def seen(layer: int, query: torch.Tensor, key: torch.Tensor, _value: Any, scaling: float) -> None:
        sums = torch.zeros(2, query.shape[1], device=query.device)
        for start in range(period, period * REPEATS, CHUNK):
            end = min(start + CHUNK, period * REPEATS)
            weights = causal_weights(query[:, :, :end], key[:, :, :end], scaling, start)[0]
            position = torch.arange(start, end, device=query.device)
            for back in range(1, REPEATS):
                rows = (position >= back * period).nonzero().flatten()
                at = position[rows] - back * period
                sums[0] += weights[:, rows, at].sum(1)
                sums[1] += weights[:, rows, at + 1].sum(1)
        sums /= period * (REPEATS - 1)
        echo[layer], induction[layer] = sums.unflatten(1, (model.kv_heads, -1)).amax(2).cpu()

    model.watch(once.repeat(REPEATS).tolist(), seen)
    return echo, induction


def retained(echo: torch.Tensor, induction: torch.Tensor, count: int) -> torch.Tensor:
    """bool [layers, KV heads]: ``count`` heads, one in ECHO_HEADS by its echo, the others by induction."""
    kept = torch.zeros(echo.numel(), dtype=torch.bool)
    for scores, upto in ((echo, round(count / ECHO_HEADS)), (induction, count)):
        order = scores.flatten().argsort(descending=True).tolist()
        for head in [head for head in order if not kept[head]][: upto - int(kept.sum())]:
            kept[head] = True
    return kept.view_as(echo)


def ways(
    model: HeadWindows,
    prompt: Prefilled,
    keeps: Sequence[int],
    heads: tuple[torch.Tensor, torch.Tensor],
    seed: int,
) -> dict[str, Kept]:
    """Every way to keep this prompt's cache, by name."""
    found = {"full": model.layers_kept(())}
    for keep in keeps:
        count = keep * model.kv_heads
        razor = retained(*heads, count)
        drawn = torch.Generator().manual_seed(seed)
        some = torch.randperm(razor.numel(), generator=drawn).view_as(razor) < count
        lazy = {"list": LISTS[keep]} if keep in LISTS else {}
        lazy |= {name: laziest(scores, keep) for name, scores in prompt.scores.items()}
        found |= {f"{name}, {keep} full": model.layers_kept(layers) for name, layers in lazy.items()}
        found[f"razor, {keep} full"] = Kept(~razor, compensated=True)
        found[f"razor without compensation, {keep} full"] = Kept(~razor)
        found[f"random heads, {keep} full"] = Kept(~some)
    return found


def ask(
    model: HeadWindows, keys: Sequence[dict[str, Any]], ways_of: Callable[[Prefilled], dict[str, Kept]]
) -> tuple[dict[str, list[bool]], dict[str, dict[str, float]]]:
    """Of each way by name: which answers are right, and the memory share by length."""
    outs: dict[str, list[dict[str, Any]]] = {}
    shares: dict[str, dict[str, float]] = {}
    for key in tqdm(keys, desc="questions"):
        prompt = model.prefill(key["prompt"])
        named = ways_of(prompt)
        tokens = model.answers(prompt, list(named.values()), max(map(len, key["answers"])))
        for (name, kept), ids in zip(named.items(), tokens, strict=True):
            outs.setdefault(name, []).append({"output_ids": ids})
            shares.setdefault(name, {})[str(prompt.tokens)] = round(model.share(kept, prompt.tokens), 4)
    return {name: found({"keys": keys}, answers) for name, answers in outs.items()}, shares


def load(path: Path, device: str, recent: int) -> HeadWindows:
    """The model in bfloat16."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return HeadWindows(model.to(device).eval(), SINKS, recent)


def arguments(description: str) -> argparse.ArgumentParser:
    """What the experiments on these questions share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--trials", type=int, default=30, help="questions of each task and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8000])
    parser.add_argument("--recent-tokens", type=int, default=1020)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """See the head of this file."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--period", type=int, default=2000, help="random tokens, which are repeated")
    parser.add_argument("--keeps", type=int, nargs="+", default=[15, 8, 4], help="full layers")
    args = parser.parse_args()
    folder = ensure_model()
    model = load(folder, args.device, args.recent_tokens)
    heads = retrieval_scores(model, args.period, args.seed)
    keys = key_questions(HfTokenizer(str(folder)), args.lengths, args.trials, args.recent_tokens, args.seed)
    hits, shares = ask(model, keys, lambda prompt: ways(model, prompt, args.keeps, heads, args.seed))
    what = f"passkey and 3-key, {args.trials} prompts each at {' and '.join(map(str, args.lengths))} tokens"
    windows = f"{SINKS} + {args.recent_tokens}"
    report = {
        **stamped("quality-razor-attention", what, model=f"{folder.name}, bfloat16, {windows}"),
        "seed": args.seed,
        "heads": {
            name: [[round(value, 4) for value in row] for row in scores.tolist()]
            for name, scores in zip(("echo", "induction"), heads, strict=True)
        },
        "methods": {
            name: {"cells": by_cell(keys, mine), **counted(mine, hits["full"]), "memory_share": shares[name]}
            for name, mine in hits.items()
        },
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, row in report["methods"].items():
        print(f"{name:38s} {row['found']} of {row['of']}", row["cells"], row["memory_share"])


if __name__ == "__main__":
    main()
