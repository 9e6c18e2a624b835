"""Which score finds the layers to keep: a study of the demo model in transformers, run by hand.

    python -m tests.engine.selection_study OUT [--tokens 1400] [--recent-tokens 252] [--trials 20] [--single]

No engine. Each passkey and 3-key prompt is prefilled with full attention; candidate scores are computed from
the weights, values and residual streams of its last 32 queries; then the answer's tokens are forced through
the model with a streaming mask in the lazy layers. Counted: answers whose every token is the most likely one,
and KL divergence from full attention over the answer's positions after the first. Some candidates are in
identify/scores, the others were tried and left. ``--single`` also makes each layer lazy by itself, and
ranks the layers by that (an oracle). OUT.json has the figures; OUT.png shows the divergence of each choice
against the attention mass it discards, summed over the lazy layers (the term of the paper's Theorem 5.1).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, DynamicCache

from lt_sglang.demo.smollm2 import ensure_model
from lt_sglang.eval.calibrate import choose_layers, laziest
from lt_sglang.eval.items import HfTokenizer
from lt_sglang.eval.plots import require_matplotlib
from lt_sglang.eval.tasks.passkey import PasskeyTask

from .dynamic_reference import streaming_rows

QUERIES, SINKS = 32, 4
KEEPS = (15, 10, 8, 6)
Seen = dict[str, torch.Tensor]

# name -> how much a layer loses (higher: keep it full). Tensors of ``Study.evidence``.
CANDIDATES: dict[str, Callable[[Seen], torch.Tensor]] = {
    "lighttransfer": lambda s: -s["mass"].mean((1, 2)),
    "discarded-mass": lambda s: (1 - s["mass"]).amax((1, 2)),
    "residual-error": lambda s: (s["error"] / s["stream"]).amax(1),
    "error-mass": lambda s: (s["error"] / s["stream"]).amax(1) * (1 - s["mass"]).amax((1, 2)),
    "residual error, mean over queries": lambda s: (s["error"] / s["stream"]).mean(1),
    "residual error, last 8 queries": lambda s: (s["error"] / s["stream"])[:, -8:].amax(1),
    "residual error, last query": lambda s: (s["error"] / s["stream"])[:, -1],
    "residual error, largest head": lambda s: (s["head_error"] / s["stream"][:, None]).amax((1, 2)),
    "error relative to the attention output": lambda s: (s["error"] / s["output"]).amax(1),
    "error, not relative": lambda s: s["error"].amax(1),
    "error after the layer's MLP": lambda s: s["mlp_error"].amax(1),
    "turn of the stream (cosine)": lambda s: s["turn"].amax(1),
    "KL by the logit lens": lambda s: s["lens"].amax(1),
}
# Also as static lists, calibrated as lt-sglang calibrate does.
STATIC = ("lighttransfer", "discarded-mass", "residual-error", "error-mass")


class Study:
    """The model in bfloat16, scores in float32; one thread."""

    def __init__(self, recent: int) -> None:
        torch.set_num_threads(1)
        self.recent = recent
        self.model = AutoModelForCausalLM.from_pretrained(
            ensure_model(), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.layers = self.model.model.layers
        self._lazy: frozenset[int] = frozenset()
        self._mask: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            layer.self_attn.register_forward_pre_hook(self._hook(index), with_kwargs=True)

    def _hook(self, index: int) -> Any:
        def replace(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": self._mask} if index in self._lazy else kwargs

        return replace

    def _run(self, ids: Sequence[int], cache: DynamicCache, attention: str, **options: Any) -> Any:
        self.model.set_attn_implementation(attention)
        return self.model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True, **options)

    @torch.inference_mode()
    def evidence(self, prompt: Sequence[int]) -> tuple[Seen, DynamicCache]:
        """[layers, heads, queries] mass, head_error; [layers, queries] the rest; and the full cache."""
        cache = DynamicCache()
        self._run(prompt[:-QUERIES], cache, "sdpa", logits_to_keep=1)
        seen = self._run(
            prompt[-QUERIES:],
            cache,
            "eager",
            logits_to_keep=1,
            output_attentions=True,
            output_hidden_states=True,
        )
        position = torch.arange(len(prompt))
        kept = (position < SINKS) | (position >= len(prompt) - self.recent)
        found: dict[str, list[torch.Tensor]] = {}
        for index, layer in enumerate(self.layers):
            weights = seen.attentions[index][0].float()
            values = cache.layers[index].values[0].float()
            values = values.repeat_interleave(weights.shape[0] // values.shape[0], 0)
            stream = seen.hidden_states[index][0].float()
            w_o = layer.self_attn.o_proj.weight.float()
            part = weights * kept
            streamed = part / part.sum(2, keepdim=True)
            lost = torch.einsum(
                "hqd,ohd->hqo", (weights - streamed) @ values, w_o.unflatten(1, (weights.shape[0], -1))
            )
            output = (weights @ values).transpose(0, 1).flatten(1) @ w_o.T
            error, after = lost.sum(0), stream + output
            full, light = self._block(layer, after), self._block(layer, after - error)
            for name, value in {
                "mass": part.sum(2),
                "head_error": lost.norm(dim=2),
                "error": error.norm(dim=1),
                "stream": stream.norm(dim=1),
                "output": output.norm(dim=1),
                "mlp_error": (full - light).norm(dim=1) / full.norm(dim=1),
                "turn": 1 - cosine_similarity(after, after - error, dim=1),
                "lens": self._lens(after[-8:], (after - error)[-8:]),
            }.items():
                found.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in found.items()}, cache

    def _block(self, layer: Any, stream: torch.Tensor) -> torch.Tensor:
        half = stream.bfloat16()
        return (half + layer.mlp(layer.post_attention_layernorm(half))).float()

    def _lens(self, full: torch.Tensor, light: torch.Tensor) -> torch.Tensor:
        p, q = (
            self.model.lm_head(self.model.model.norm(x.bfloat16())).float().log_softmax(1)
            for x in (full, light)
        )
        return (p.exp() * (p - q)).sum(1)

    @torch.inference_mode()
    def forced(
        self, prompt: Sequence[int], answer: Sequence[int], cache: DynamicCache, lazy: Collection[int]
    ) -> torch.Tensor:
        """float32 log-probabilities [len(answer) - 1, vocabulary] of what follows each answer token."""
        stop = len(prompt) + len(answer) - 1
        self._lazy = frozenset(lazy)
        self._mask = streaming_rows(len(prompt), stop, len(prompt), SINKS, self.recent).bfloat16()
        logits = self._run(answer[:-1], copy.deepcopy(cache), "sdpa").logits[0].float()
        self._lazy, self._mask = frozenset(), None
        return logits.log_softmax(1)


class Tries:
    """Lazy sets tried on one prompt, each once: (answer right, KL divergence in nats)."""

    def __init__(
        self, bench: Study, prompt: Sequence[int], answer: Sequence[int], cache: DynamicCache
    ) -> None:
        self._forced = lambda lazy: bench.forced(prompt, answer, cache, lazy)
        self._target = torch.tensor(answer[1:])
        self._full = self._forced(())
        self.found: dict[frozenset[int], tuple[bool, float]] = {}

    def __call__(self, lazy: Collection[int]) -> tuple[bool, float]:
        key = frozenset(lazy)
        if key not in self.found:
            light = self._forced(key)
            kl = (self._full.exp() * (self._full - light)).sum(1).mean()
            self.found[key] = bool((light.argmax(1) == self._target).all()), float(kl)
        return self.found[key]


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a prompt: every choice and every lazy set that was tried."""
    bench, tokenizer = Study(args.recent_tokens), HfTokenizer(str(ensure_model()))
    tasks = [PasskeyTask(args.tokens, args.trials, keys, args.recent_tokens, args.seed) for keys in (1, 3)]
    items = [item for task in tasks for item in task.items(tokenizer)]
    seen = [bench.evidence(item.prompt) for item in items]
    laziness = [
        {name: (-score(evidence)).tolist() for name, score in CANDIDATES.items()} for evidence, _ in seen
    ]
    records = []
    for number, (item, (evidence, cache)) in enumerate(zip(items, seen, strict=True)):
        tries = Tries(bench, item.prompt, tokenizer.encode(f" {item.answers[0]}"), cache)
        scores = laziness[number]
        if args.single:
            single = [-tries([layer])[1] for layer in range(len(bench.layers))]
            scores = {**scores, "oracle: each layer by itself": single}
        choices = {
            f"{name} {keep}": laziest(values, keep) for name, values in scores.items() for keep in KEEPS
        }
        # Calibrated on the other half of the prompts.
        others = laziness[1 - number % 2 :: 2]
        for name in STATIC:
            for keep in KEEPS:
                chosen = choose_layers([other[name] for other in others], keep)
                choices[f"static, {name} {keep}"] = chosen.lazy_layers
        results = {name: tries(lazy) for name, lazy in choices.items()}
        discarded = (1 - evidence["mass"]).mean((1, 2))
        sets = [[float(discarded[sorted(lazy)].sum()), kl] for lazy, (_, kl) in tries.found.items()]
        full = tries(())[0]
        records.append({"full": full, "results": results, "sets": sets})
        print(number + 1, len(items), item.task, item.cell["depth"], full, flush=True)
    return records


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each choice: answers found, relative to full attention's, and the mean divergence in nats."""
    full = sum(record["full"] for record in records)
    return {
        "prompts": len(records),
        "full": full,
        "choices": {
            name: {
                "found": sum(record["results"][name][0] for record in records),
                "ratio": sum(record["results"][name][0] for record in records) / max(full, 1),
                "kl": statistics.fmean(record["results"][name][1] for record in records),
            }
            for name in records[0]["results"]
        },
    }


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Divergence against discarded mass, one dot a lazy set and prompt."""
    pyplot = require_matplotlib()
    figure, axis = pyplot.subplots(figsize=(6, 4))
    dots = [dot for record in records for dot in record["sets"]]
    axis.scatter([mass for mass, _ in dots], [max(kl, 1e-6) for _, kl in dots], s=4, alpha=0.3)
    axis.set_yscale("log")
    axis.set_xlabel("discarded attention mass, mean over heads and queries, summed over lazy layers")
    axis.set_ylabel("KL divergence, nats")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=1400)
    parser.add_argument("--recent-tokens", type=int, default=252)
    parser.add_argument("--trials", type=int, default=20, help="a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--single", action="store_true")
    args = parser.parse_args()
    records = study(args)
    found = summary(records)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    args.out.with_suffix(".json").write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")
    plot(records, args.out.with_suffix(".png"))
    print(f"full attention {found['full']} of {found['prompts']}")
    names = dict.fromkeys(name.rpartition(" ")[0] for name in found["choices"])
    for name in names:
        cells = [found["choices"][f"{name} {keep}"] for keep in KEEPS]
        print(
            f"{name:42s}",
            "  ".join(
                f"{keep}: {c['found']} ({c['ratio']:.3f}) {c['kl']:.4f}"
                for keep, c in zip(KEEPS, cells, strict=True)
            ),
        )


if __name__ == "__main__":
    main()
