"""The paper's error bound (arXiv 2410.13846, Theorem 5.1) against true errors. On a CPU, in transformers.

    python -m loadtest.experiments.theorem OUT.json [--model FOLDER] [--rehearse] [--figure FILE.png]
        [--tokens 512] [--texts 2]

Prompts: ``texts`` with three keys, and as many of running text. Lists of lazy layers, at three shares:
those that discard the least and the most mass for the prompt's last queries, and random ones. What e, s, (4)
and (5) are: theorem_bounds.py.

toys: the paper's own transformer, means over seeds; the program fails where (4) or (5) does not hold.
recursion: (4) derived again for Llama-like models; the program fails where it does not hold. logits_bound:
what follows for the logits. printed: (5) with B the largest Frobenius norm of a weight, into which the norms'
weights, sqrt(hidden) and the scale of the scores are folded, and without the gate. No theorem says that this
one holds.
--model: a dense llama, mistral, qwen2 or qwen3, by default the demo model. A mixture's router is not
Lipschitz, as the theorem wants it. --rehearse: a tiny random model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch.linalg import matrix_norm
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from loadtest.experiments import theorem_bounds
from loadtest.experiments.offline import stamped
from loadtest.experiments.theorem_bounds import SILU, SINK, Bounds, Measured, rows, turned
from loadtest.experiments.train_speed import TINY
from lt_sglang.demo.smollm2 import ensure_model
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import HfTokenizer
from lt_sglang.eval.plots import require_matplotlib, save
from lt_sglang.eval.tasks.haystack import Prose
from lt_sglang.eval.tasks.passkey import PasskeyTask

QUERIES, SHARES, RANDOM = 32, (0.25, 0.5, 0.75), 16
TOYS, SEEDS = ((1, 0.1), (1, 1.0), (4, 0.1), (4, 1.0), (4, 4.0)), 10  # heads and B
ROUNDING = 1 + 1e-4  # float32's
# What a bound adds up over a list's layers, or ends with; and what it should tell.
TERMS, ERRORS = ("mass_last", "mass", "injected", "recursion"), ("error", "logits", "logits_last")


class Watched:
    """A model whose layers' inputs are kept, and whose lazy layers have an explicit mask."""

    def __init__(self, model: Any) -> None:
        mlp = model.model.layers[0].mlp
        if (
            not hasattr(mlp, "gate_proj")
            or mlp.gate_proj.bias is not None
            or model.config.hidden_act != "silu"
        ):
            raise LightTransferError(
                f"model: {model.config.model_type} has no dense MLP of SiLU without biases"
            )
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation("eager")
        norm, head = model.model.norm, model.lm_head.weight.double()
        self.bounds = [Bounds(layer) for layer in model.model.layers]
        self.radius, self.unembed = self.bounds[0].radius, theorem_bounds.spectral(head * norm.weight)
        unembed = self.radius * float(matrix_norm(head * norm.weight))
        self.frobenius = max(unembed, *(one.frobenius for one in self.bounds))
        self._gram = head.mT @ head
        self._lazy: Collection[int] = ()
        self._states: list[torch.Tensor] = []
        self._found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.register_forward_pre_hook(self._masking(number), with_kwargs=True)
            layer.self_attn.register_forward_hook(self._measure, with_kwargs=True)
            layer.input_layernorm.register_forward_pre_hook(self._keep)
            layer.post_attention_layernorm.register_forward_pre_hook(self._keep)
        norm.register_forward_pre_hook(self._keep)

    @torch.no_grad()
    def run(self, ids: Sequence[int], lazy: Collection[int], recent: int) -> list[torch.Tensor]:
        """What each RMSNorm gets, in order, and what the last one gives: float32 [tokens, hidden] each."""
        self._lazy, self._states = lazy, []
        self._hidden = ~theorem_bounds.seen(len(ids), recent)
        self._mask = torch.zeros(self._hidden.shape).masked_fill_(self._hidden, -math.inf)[None, None]
        last = self.model.model(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]
        return [*self._states, last]

    def measure(self, ids: Sequence[int], recent: int) -> tuple[list[torch.Tensor], list[Measured]]:
        """The full model's states, and what the bounds need of its layers."""
        self._found = []
        states = self.run(ids, (), recent)
        found, self._found = self._found, None
        layers = []
        for number, (mass, changed, values) in enumerate(found):
            last, worst = float(mass[:, -QUERIES:].mean()), float(mass.mean(0).max())
            most = float((2 * values @ mass.double()).max()) * ROUNDING
            lowest = (self.lowest(states[2 * number + part]) for part in (0, 1))
            layers.append(Measured(last, worst, rows(changed), most, values, *lowest))
        return states, layers

    def lowest(self, states: torch.Tensor) -> float:
        """The smallest norm of a row with RMSNorm's eps in it."""
        eps = self.model.config.rms_norm_eps * states.shape[1]
        return math.sqrt(float(states.double().square().sum(-1).min()) + eps)

    def logits_error(self, difference: torch.Tensor) -> torch.Tensor:
        """float64 [tokens]: by how much each row of logits differs. difference: of the last norm's output."""
        # No row as long as the vocabulary is needed: |W x|² = x (W'W) x.
        change = difference.double()
        return torch.linalg.vecdot(change @ self._gram, change).clamp(min=0).sqrt()

    def _keep(self, _module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._states.append(args[0][0])

    def _masking(self, layer: int) -> Any:
        def mask(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"attention_mask": self._mask} if layer in self._lazy else kwargs

        return mask

    def _measure(
        self, module: Any, _args: Any, kwargs: dict[str, Any], out: tuple[torch.Tensor, ...]
    ) -> None:
        """Run the layer's attention once more, with the mask."""
        if self._found is not None:
            masked = module.forward(**kwargs | {"attention_mask": self._mask})[0]
            value = module.v_proj(kwargs["hidden_states"])[0].unflatten(1, (-1, module.head_dim))
            project = module.o_proj.weight.unflatten(1, (-1, module.head_dim)).transpose(0, 1)
            value = value.transpose(0, 1).repeat_interleave(len(project) // value.shape[1], 0)
            largest = [(v @ p.mT).norm(dim=1).max() for v, p in zip(value, project, strict=True)]
            mass = (out[1][0] * self._hidden).sum(-1)
            self._found.append((mass, masked[0] - out[0][0], torch.stack(largest).double()))


class Prompt:
    """One prompt in the full model, which lists of lazy layers are held against."""

    def __init__(self, model: Watched, ids: Sequence[int], recent: int) -> None:
        self.model, self.ids, self.recent = model, ids, recent
        self.states, self.found = model.measure(ids, recent)

    def lists(self, share: float, drawn: int, seed: int) -> dict[str, list[int]]:
        """Lazy layers by name: least, most, random 0, ... seed: of the random ones."""
        layers = range(len(self.found))
        count, order = round(share * len(layers)), sorted(layers, key=lambda layer: self.found[layer].last)
        named = {"least": order[:count], "most": order[-count:]}
        for number in range(drawn):
            named[f"random {number}"] = random.Random(f"{share} {number} {seed}").sample(layers, count)
        return {name: sorted(chosen) for name, chosen in named.items()}

    def compare(self, lazy: Sequence[int]) -> dict[str, Any]:
        """True errors and bounds; AssertionError where a derived one does not hold.

        by_layer: e_i, what (4) allows if e_(i-1) is known, and what it allows from the prompt on.
        """
        model, found, heads = self.model, self.found, len(self.found[0].values)
        hybrid = model.run(self.ids, lazy, self.recent)
        true = [rows(one - other) for one, other in zip(self.states[:-1:2], hybrid[:-1:2], strict=True)]
        logits = model.logits_error(self.states[-1] - hybrid[-1])
        allowed, steps = [0.0], []
        for number, (bounds, layer) in enumerate(zip(model.bounds, found, strict=True)):
            allowed.append(bounds.step(allowed[-1], layer, number in lazy))
            steps.append(bounds.step(true[number], layer, number in lazy))
            most = min(allowed[-1], steps[-1])
            assert true[number + 1] <= most * ROUNDING, f"layer {number}: {true[number + 1]} > {most}"
        bound = model.unembed * turned(model.radius, allowed[-1], model.lowest(self.states[-2]))
        assert float(logits.max()) <= bound * ROUNDING, f"logits: {logits.max()} > {bound}"
        mass = sum(found[layer].worst for layer in lazy)
        five = [theorem_bounds.printed(s, len(found), model.frobenius, heads, SILU) for s in (mass, 0.0)]
        return {
            "lazy": list(lazy),
            "mass_last": sum(found[layer].last for layer in lazy),
            "mass": mass,
            "injected": sum(found[layer].injected for layer in lazy),
            "error": true[-1],
            "recursion": allowed[-1],
            "mass_in_recursion": sum(found[layer].most for layer in lazy) / allowed[-1],
            "logits": float(logits.max()),
            "logits_last": float(logits[-QUERIES:].mean()),
            "logits_bound": bound,
            "logits_bound_at_cap": bound == 2 * model.unembed * model.radius,
            "printed": five[0],
            "mass_in_printed": 1 - five[1] / five[0],
            "by_layer": {"true": true[1:], "step": steps, "recursion": allowed[1:]},
        }


def rank(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's correlation; 0 if all values of one are alike."""
    return float(spearmanr(one, other).statistic) if len(set(one)) > 1 and len(set(other)) > 1 else 0.0


def mean(parts: Sequence[Any]) -> Any:
    """Of numbers, or of mappings of them with the same keys."""
    if isinstance(parts[0], Mapping):
        return {key: mean([part[key] for part in parts]) for key in parts[0]}
    return statistics.fmean(parts)


def agreement(compared: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Rank correlation over lists of what a bound adds up with each true error."""
    return {
        error: {
            term: rank([one[term] for one in compared], [one[error] for one in compared]) for term in TERMS
        }
        for error in ERRORS
    }


def summary(prompts: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Of one share. prompts: of each, comparisons by the list's name. Medians over all, else means."""
    every = [one for named in prompts for one in named.values()]
    kinds = {
        kind: [one for named in prompts for name, one in named.items() if name.startswith(kind)]
        for kind in ("least", "most", "random")
    }
    steps = [
        most / true
        for one in every
        for most, true in zip(one["by_layer"]["step"], one["by_layer"]["true"], strict=True)
        if true
    ]
    return {
        "lists": {
            kind: {key: mean([one[key] for one in those]) for key in ("mass_last", "mass", *ERRORS)}
            for kind, those in kinds.items()
        },
        "lists_better_than_least": {
            error: mean(
                [sum(one[error] < named["least"][error] for one in named.values()) for named in prompts]
            )
            for error in ERRORS
        },
        "step_over_error": statistics.median(steps),
        "recursion_over_error": statistics.median(one["recursion"] / one["error"] for one in every),
        "logits_bound_over_logits": statistics.median(one["logits_bound"] / one["logits"] for one in every),
        "logits_bounds_at_cap": mean([one["logits_bound_at_cap"] for one in every]),
        "printed_over_logits": statistics.median(one["printed"] / one["logits"] for one in every),
        "most_mass_in_recursion": max(one["mass_in_recursion"] for one in every),
        "most_mass_in_printed": max(one["mass_in_printed"] for one in every),
        "spearman": mean([agreement(list(named.values())) for named in prompts]),
    }


def report(model: Watched, prompts: Sequence[Sequence[int]], recent: int, drawn: int) -> dict[str, Any]:
    """Every prompt, share and list."""
    compared: dict[str, list[dict[str, dict[str, Any]]]] = {f"{share:.0%}": [] for share in SHARES}
    layers, per_layer = [], ("last", "worst", "injected", "most")
    for seed, ids in enumerate(tqdm(prompts, desc="prompts")):
        prompt = Prompt(model, ids, recent)
        layers.append([{key: getattr(one, key) for key in per_layer} for one in prompt.found])
        for share in SHARES:
            made = prompt.lists(share, drawn, seed)
            compared[f"{share:.0%}"].append({name: prompt.compare(lazy) for name, lazy in made.items()})
    of_layers = [
        {key: rank([one[key] for one in found], [one["injected"] for one in found]) for key in per_layer}
        for found in layers
    ]
    pooled = [
        agreement([one for named in shares for one in named.values()])
        for shares in zip(*compared.values(), strict=True)
    ]
    return {
        "norm": model.frobenius,
        "layers": [mean(one) for one in zip(*layers, strict=True)],
        "spearman_of_layers_with_injected": mean(of_layers),
        "spearman_of_all_shares": mean(pooled),
        "shares": {share: summary(one) for share, one in compared.items()},
        "compared": compared,
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Mass and injected error by layer; errors and what (4) allows by layer; mass against true errors."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    labels = {"worst": "mass, worst query (s)", "last": "mass, last queries", "injected": "error injected"}
    for key, label in {**labels, "most": "its bound by the mass"}.items():
        axes[0].plot([one[key] for one in found["layers"]], label=label)
    lines = found["compared"]["50%"][0]["least"]["by_layer"]
    for key, label in {"true": "true", "step": "(4), e before known", "recursion": "(4)"}.items():
        axes[1].plot(lines[key], label=label)
    for share, prompts in found["compared"].items():
        every = [one for named in prompts for one in named.values()]
        dots = [one["mass"] for one in every], [one["logits_last"] for one in every]
        axes[2].scatter(*dots, s=12, label=f"{share} lazy")
    axes[0].set(title="a lazy layer alone", xlabel="layer", yscale="log", ylim=(0.03, 1e5))
    axes[1].set(title="e behind a layer, half lazy, least mass", xlabel="layer", yscale="log")
    axes[2].set(title="lists of lazy layers", xlabel="sum of s", ylabel="logits' error, last queries")
    for axis in axes:
        axis.legend(fontsize=8, loc="upper left" if axis is axes[0] else "best")
    save(pyplot, figure, path)


def prompts_of(tokenizer: HfTokenizer, tokens: int, texts: int, recent: int) -> list[list[int]]:
    """``texts`` prompts with three keys, as many of running text."""
    keys = PasskeyTask(tokens, texts, keys=3, window=recent).items(tokenizer)
    prose = Prose.load(tokenizer, None).ids
    starts = [(len(prose) - tokens) * number // max(texts - 1, 1) for number in range(texts)]
    return [*(list(item.prompt) for item in keys), *(list(prose[at : at + tokens]) for at in starts)]


def rounded(value: Any) -> Any:
    """With four digits of every float in it."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    toys = [
        {
            "heads": heads,
            "norm": norm,
            **mean([theorem_bounds.toy(seed, heads, norm) for seed in range(SEEDS)]),
        }
        for heads, norm in TOYS
    ]
    tokens = 96 if args.rehearse else args.tokens
    recent = tokens // 4 - SINK
    if args.rehearse:
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **TINY | {"num_hidden_layers": 8})
        name, model = "tiny", AutoModelForCausalLM.from_config(config)
        prompts = torch.randint(config.vocab_size, (args.texts, tokens)).tolist()
    else:
        folder = args.model or str(ensure_model())
        name, model = Path(folder).name, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompts = prompts_of(HfTokenizer(folder), tokens, args.texts, recent)
    found = report(Watched(model), prompts, recent, 2 if args.rehearse else RANDOM)
    if args.figure:
        draw(found, args.figure)
    for prompt in (named for prompts in found["compared"].values() for named in prompts):
        for name_of_list, one in prompt.items():
            if name_of_list != "least":
                del one["by_layer"]
    what = f"Theorem 5.1 against true errors, {SINK} + {recent}, {len(prompts)} prompts of {tokens} tokens"
    result = stamped("theorem", what, model=name, dtype="float32") | {"toys": toys} | found
    args.out.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rounded(found["shares"]), indent=1))


if __name__ == "__main__":
    main()
