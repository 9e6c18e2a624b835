"""Is a layer as lazy for the tokens it generates as for its prompt? On a CPU, in transformers.

    python -m loadtest.experiments.laziness OUT.json --model FOLDER [--texts 8] [--tokens 4096]
        [--generated 128] [--figure FILE.png]

A layer's lazy ratio for a query is the attention mass on the first w_sink and the last w_recent keys, the
mean over heads (arXiv 2410.13846, eq. 1). LightTransfer chooses by the prompt's last 32 queries and keeps the
choice, so it needs ratios that stay (section 4; figures 2 and 9 of the paper). Measured on prompts with three
keys, and on running text. Blocks are of 32 generated tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from lt_sglang.bench.machine import stamp
from lt_sglang.eval.items import HfTokenizer
from lt_sglang.eval.plots import require_matplotlib, save
from lt_sglang.eval.tasks.haystack import Prose
from lt_sglang.eval.tasks.passkey import PasskeyTask

SINK, RECENT, QUERIES, BLOCK = 4, 1020, 32, 32


def prompts(tokenizer: HfTokenizer, tokens: int, texts: int) -> dict[str, list[list[int]]]:
    """By kind, ``texts`` prompts of ``tokens`` tokens."""
    keys = PasskeyTask(tokens, texts, keys=3, window=RECENT).items(tokenizer)
    prose = Prose.load(tokenizer, None).ids
    step = (len(prose) - tokens) // max(texts - 1, 1)
    return {
        "3-key": [list(item.prompt) for item in keys],
        "text": [list(prose[at : at + tokens]) for at in range(0, step * texts, step)],
    }


class Watched:
    """A model whose attention weights are read, a few queries at a time."""

    def __init__(self, folder: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def ratios(self, prompt: Sequence[int], generated: int) -> torch.Tensor:
        """float32 [layers, 1 + generated]: of the prompt's last queries, then of each greedy token."""
        cache = DynamicCache()
        self._model.set_attn_implementation("sdpa")
        self._model(torch.tensor([prompt[:-QUERIES]]), past_key_values=cache, logits_to_keep=1)
        self._model.set_attn_implementation("eager")
        columns = []
        ids = torch.tensor([prompt[-QUERIES:]])
        for _ in range(1 + generated):
            out = self._model(ids, past_key_values=cache, output_attentions=True, logits_to_keep=1)
            columns.append(torch.stack([_ratio(weights[0]) for weights in out.attentions]))
            ids = out.logits[:, -1:].argmax(-1)
        return torch.stack(columns, dim=1)


def _ratio(weights: torch.Tensor) -> torch.Tensor:
    """The mean lazy ratio of weights [heads, queries, keys], whose queries are the last positions."""
    queries, keys = weights.shape[1:]
    position = torch.arange(keys)
    own = torch.arange(keys - queries, keys)[:, None]
    seen = (position < SINK) | ((position > own - RECENT) & (position <= own))
    return (weights * seen).sum(-1).mean()


def summary(found: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Of one kind of prompt: how far ratios of layers and tokens lie apart, and whether choices stay."""
    layers = found[0].shape[0]
    blocks = (found[0].shape[1] - 1) // BLOCK
    agreed: list[list[float]] = [[] for _ in range(blocks)]
    ranked: list[list[float]] = [[] for _ in range(blocks)]
    for ratios in found:
        chosen = set(ratios[:, 0].topk(layers // 2).indices.tolist())
        for block in range(blocks):
            later = ratios[:, 1 + block * BLOCK : 1 + (block + 1) * BLOCK].mean(1)
            agreed[block].append(len(chosen & set(later.topk(layers // 2).indices.tolist())) / len(chosen))
            ranked[block].append(float(spearmanr(ratios[:, 0], later).statistic))
    generated = torch.stack(list(found))[:, :, 1:]
    return {
        "prompts": len(found),
        "between_layers": round(float(generated.mean((0, 2)).std()), 4),
        "between_tokens": round(float(generated.std(2).mean()), 4),
        "same_layers_by_block": [round(statistics.fmean(one), 3) for one in agreed],
        "rank_correlation_by_block": [round(statistics.fmean(one), 3) for one in ranked],
        "prompt_by_layer": _rounded(torch.stack([one[:, 0] for one in found]).mean(0)),
        "generated_by_layer": _rounded(generated.mean((0, 2))),
    }


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def draw(found: dict[str, list[torch.Tensor]], path: Path) -> None:
    """Lazy ratio by layer (down) and generated token (across), the mean over prompts; a panel a kind."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(1, len(found), figsize=(10, 4), sharey=True, squeeze=False)
    for axis, (kind, ratios) in zip(axes[0], found.items(), strict=True):
        mean = torch.stack(ratios).mean(0)
        image = axis.imshow(mean.numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.axvline(0.5, color="white")
        axis.set_title(kind)
        axis.set_xlabel("prompt's last queries | generated token")
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes[0]), label="lazy ratio")
    save(pyplot, figure, path)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--generated", type=int, default=128)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    tokenizer, model = HfTokenizer(args.model), Watched(args.model)
    found = {
        kind: [model.ratios(prompt, args.generated) for prompt in tqdm(made, desc=kind)]
        for kind, made in prompts(tokenizer, args.tokens, args.texts).items()
    }
    told = f"--texts {args.texts} --tokens {args.tokens} --generated {args.generated}"
    report = {
        **stamp("laziness-decode", seed=0),
        "command": f"python -m loadtest.experiments.laziness OUT.json --model FOLDER {told}",
        "workload": {
            "model": Path(args.model).name,
            "what": f"lazy ratios, {SINK} + {RECENT}, of the last {QUERIES} queries and of greedy tokens",
            "dtype": "float32",
        },
        "kinds": {kind: summary(ratios) for kind, ratios in found.items()},
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for kind, row in report["kinds"].items():
        print(kind, {name: value for name, value in row.items() if not name.endswith("by_layer")})
    if args.figure:
        draw(found, args.figure)


if __name__ == "__main__":
    main()
