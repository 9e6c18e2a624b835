"""Dynamic mode on a GPU: choices and outputs against float32, prefill and decode times.

    python tests/gpu/dynamic.py OUT_FOLDER [--only parity,speed,static,prefill,residual,...] [--budget-s 540]
    python tests/gpu/dynamic.py OUT_FOLDER --only parity,tp --tp 2

parity: the engine in bfloat16 against transformers in float32, eager attention weights. A choice may differ
only where the two layers' scores are closer than bfloat16's error on them, which is measured in the same run;
outputs are held to the reference of the layers that the engine chose. speed: the Mistral-7B shape, dummy
weights, every request's layers drawn at random (the scores run, then noise is added), so that all differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu import parity
from tests.gpu.run import (
    NEW_TOKENS,
    Run,
    Step,
    arguments,
    cell,
    engine_args,
    hybrid,
    lazy_step,
    profile,
    run_cells,
    stock_step,
)
from tests.gpu.shapes import MISTRAL_7B, QWQ_32B, Shape
from tests.lazy_queue import popped_layers

KEEP = 3
LAST = 32
COPIES = 4


def dynamic(keep: int, sink: int, recent: int, expected: int, output: int, **options: Any) -> dict[str, Any]:
    """Engine arguments that switch dynamic mode on."""
    return hybrid(sink, recent, expected, output, mode="dynamic", keep=keep, **options)


class Reference:
    """The float32 model: ratios from its own attention weights, then a mask for the layers chosen."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.to(device).eval()
        self.lazy: frozenset[int] = frozenset()
        self.ratios: list[float] = []
        self.boundary = 0
        self._mask: torch.Tensor | None = None
        for layer in self.model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._set_mask, with_kwargs=True)
            layer.self_attn.register_forward_hook(self._take_ratio)

    def _set_mask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if module.layer_idx in self.lazy:
            kwargs["attention_mask"] = self._mask
        return args, kwargs

    def _take_ratio(self, module: Any, args: Any, output: Any) -> None:
        weights = output[1][0, :, max(self.boundary - LAST, 0) : self.boundary, : self.boundary]
        key = torch.arange(self.boundary, device=weights.device)
        kept = (key < parity.SINK) | (key >= self.boundary - parity.RECENT)
        self.ratios.append(weights[:, :, kept].sum(-1).mean().item())

    @torch.no_grad()
    def score(self, tokens: list[int], prompt: int) -> list[float]:
        """The lazy ratio of every layer."""
        self.lazy, self.ratios, self.boundary = frozenset(), [], prompt
        self.model(torch.tensor([tokens[:prompt]], device=self.device), logits_to_keep=1)
        return self.ratios

    @torch.no_grad()
    def logprobs(self, tokens: list[int], prompt: int, lazy: list[int]) -> torch.Tensor:
        """float32 [len - 1]; queries from ``prompt`` on are streaming in ``lazy`` layers."""
        self.lazy, self.ratios, self.boundary = frozenset(lazy), [], prompt
        at = torch.arange(len(tokens), device=self.device)
        gap = at[:, None] - at[None, :]
        near = (at[None, :] < parity.SINK) | (gap < parity.RECENT) | (at[:, None] < prompt)
        mask = torch.zeros(gap.shape, device=self.device)
        self._mask = mask.masked_fill_(~((gap >= 0) & near), float("-inf"))[None, None]
        ids = torch.tensor([tokens], device=self.device)
        logits = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        return logits.gather(1, ids[0, 1:, None])[:, 0].cpu()


def judge(scored: list[dict[str, Any]], reference: Reference, control: bool = False) -> dict[str, Any]:
    """Errors of log-probabilities, and how the choices compare. control: the other layers are lazy."""
    differences, equal, excused, wrong, score_error = [], 0, 0, [], 0.0
    for prompt, out in zip(parity.prompts(), scored, strict=True):
        decision = out["decision"]
        lazy = decision["lazy_layers"]
        if decision["laziness"] is not None:
            ratios = reference.score(prompt, len(prompt))
            errors = [abs(a - b) for a, b in zip(ratios, decision["laziness"], strict=True)]
            score_error = max(score_error, *errors)
            expected = sorted(popped_layers(ratios, KEEP))
            if expected == lazy:
                equal += 1
            else:
                swapped = set(expected) ^ set(lazy)
                spread = max(ratios[one] for one in swapped) - min(ratios[one] for one in swapped)
                if spread <= 2 * max(errors):
                    excused += 1
                else:
                    wrong.append([len(prompt), expected, lazy, spread, max(errors)])
        if control:
            lazy = [layer for layer in range(6) if layer not in lazy]
        want = reference.logprobs(prompt + out["output_ids"], len(prompt), lazy)
        got = torch.tensor(out["input_logprobs"] + out["output_logprobs"])
        differences.append((got - want).abs())
    every = torch.cat(differences)
    return {
        "mean": every.mean().item(),
        "max": every.max().item(),
        "choices_equal": equal,
        "choices_within_noise": excused,
        "choices_wrong": wrong,
        "largest_score_error": score_error,
        "cached": sum(out["cached_tokens"] for out in scored),
    }


def compare_copies(scored: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether each of n answers has the layers of n = 1, and how far its log-probabilities are off.

    Compared as long as the tokens are the same: a batch of four rounds otherwise than one request.
    """
    layers = outputs = of = 0
    largest = 0.0
    for prompt in scored:
        alone, *copies = prompt["copies"]
        for copy in copies:
            of += 1
            layers += copy["decision"]["lazy_layers"] == alone["decision"]["lazy_layers"]
            outputs += copy["output_ids"] == alone["output_ids"]
            for mine, theirs, token, other in zip(
                copy["output_logprobs"],
                alone["output_logprobs"],
                copy["output_ids"],
                alone["output_ids"],
                strict=True,
            ):
                if token != other:
                    break
                largest = max(largest, abs(mine - theirs))
    return {"of": of, "layers_equal": layers, "outputs_equal": outputs, "largest_difference": largest}


def parity_steps(model: Path) -> list[Step]:
    """Small engines: stock (the noise), graphs with slot churn, eager with prefix hits."""
    common = {
        "chunked_prefill_size": 1024,
        "mem_fraction_static": 0.25,
        "disable_prefill_cuda_graph": True,
        "cuda_graph_bs_decode": [1, 2, 4, 8, 12],
    }
    options = {"score": "lighttransfer", "staging_tokens": 5200, "check_tables": True}
    on = dynamic(KEEP, parity.SINK, parity.RECENT, 2048, parity.NEW_TOKENS, **options)
    engines = {
        "stock": engine_args(model, **common, max_total_tokens=40000, attention_backend="flashinfer"),
        "graph": engine_args(model, **common, max_total_tokens=12000, **on),
        "eager": engine_args(model, **common, max_total_tokens=40000, **on, disable_cuda_graph=True),
    }
    score = {"kind": "score", "prompts": parity.prompts(), "new_tokens": parity.NEW_TOKENS}
    steps = []
    for name, engine in engines.items():
        first = {**score, "decisions": name != "stock"}
        # The graph engine's pool is too small to keep a prefix.
        tasks = [first, first if name == "graph" else parity.hits_task()]
        if name == "graph":
            tasks.append({**score, "kind": "copies", "copies": COPIES})
        steps.append(Step(name, engine, tasks, 200))
    return steps


def run_parity(run: Run) -> None:
    """Choices and log-probabilities against float32."""
    model = parity.make_model(Path("/tmp/lt-parity-model"))
    outs = {
        step.name: result
        for step, result in run.jobs_together(parity_steps(model))
        if result and result["tasks"]
    }
    found: dict[str, Any] = {}
    if "stock" in outs:
        plain = parity.Reference(model, "cuda")
        found["stock"] = parity.errors(outs["stock"]["tasks"][0], plain, ())
        for hits in outs["stock"]["tasks"][1:]:
            found["stock_hits"] = parity.hit_errors(hits, lambda tokens, *_: plain.logprobs(tokens, ()))
    reference = Reference(model, "cuda")
    for name in ("graph", "eager"):
        for index, scored in enumerate(outs.get(name, {"tasks": []})["tasks"]):
            if index == 0:
                found[name] = judge(scored, reference)
            elif "copies" in scored[0]:
                found["copies"] = compare_copies(scored)
            elif "logprobs" in scored[0]:
                found[f"{name}_hits"] = parity.hit_errors(
                    scored,
                    lambda tokens, prompt, out: reference.logprobs(
                        tokens, prompt, out["decision"]["lazy_layers"]
                    ),
                )
            else:
                repeated = [out["cached_tokens"] for out in scored]
                found[f"{name}_again"] = {"cached": sum(repeated)}
    if "graph" in outs:
        found["wrong_layers_control"] = judge(outs["graph"]["tasks"][0], reference, control=True)
    if "graph" in outs and "eager" in outs:
        pairs = list(zip(outs["graph"]["tasks"][0], outs["eager"]["tasks"][0], strict=True))
        found["graph_equals_eager"] = {
            "outputs": sum(a["output_ids"] == b["output_ids"] for a, b in pairs),
            "choices": sum(a["decision"]["lazy_layers"] == b["decision"]["lazy_layers"] for a, b in pairs),
            "of": len(pairs),
        }
    run.report["parity"] = found
    for label, value in found.items():
        run.say(f"dynamic {label:22s} " + "  ".join(f"{key} {_short(item)}" for key, item in value.items()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def dynamic_step(
    name: str,
    tasks: list[dict[str, Any]],
    limit_s: float,
    shape: Shape,
    engine: dict[str, Any],
    tokens: int = 16384,
    **options: Any,
) -> Step:
    """The true shape, split for prompts of ``tokens``, layers drawn at random for each request.

    options: keys of the configuration.
    """
    on = dynamic(shape.keep, shape.sink, shape.recent, tokens + NEW_TOKENS, NEW_TOKENS, **options)
    engine = engine_args(shape.folder(), load_format="dummy", **on, **engine)
    return Step(name, engine, tasks, limit_s, vocab=shape.vocab, env={"LT_SHUFFLE_LAYERS": "1"})


def speed_steps() -> dict[str, list[Step]]:
    """Every engine of a comparison with the same flags."""
    quick: dict[str, Any] = {"disable_prefill_cuda_graph": True}
    quick["cuda_graph_bs_decode"] = [1, 2, 4, *range(8, 96, 8)]
    prefill = [
        {"kind": "prefill", "prompt_tokens": 4096, "repeats": 5},
        {"kind": "prefill", "prompt_tokens": 32768, "repeats": 3},
    ]
    profiles = [profile(32768, 1, 1), profile(16384, 8, 40)]
    # The two last fit whatever the split is: both modes decode the same batch.
    cells = [cell(16384, 48), cell(8192, 32), cell(32768, 12)]
    stock_cells = [cell(16384, 29), cell(8192, 55), cell(32768, 14)]

    def step(name: str, tasks: list[dict[str, Any]], limit_s: float, **options: Any) -> Step:
        return dynamic_step(name, tasks, limit_s, MISTRAL_7B, quick, **options)

    # Under tensor parallelism: QwQ-32B's shape.
    few = {**quick, "cuda_graph_bs_decode": [1, 2, 4, *range(8, 72, 8)]}
    lengths = [cell(16384, 34), cell(8192, 16), cell(32768, 8)]
    checked = {"score": "lighttransfer", "check_tables": True}
    return {
        "speed": [step("dynamic_16k", cells, 160, score="lighttransfer")],
        "prefill": [step("dynamic_prefill", [*prefill, *profiles], 120, score="lighttransfer")],
        "residual": [step("dynamic_residual", prefill, 90, score="residual-error")],
        "chunk": [step("dynamic_first_chunk", prefill, 90, score="lighttransfer", decide="first-chunk")],
        "static": [lazy_step(16384, "half", cells, 160, **quick)],
        "stock": [stock_step("flashinfer", [*stock_cells, *prefill], 200, **quick)],
        "fa3": [stock_step("fa3", prefill, 100, **quick)],
        "tp": [
            dynamic_step("dynamic_tp", lengths, 250, QWQ_32B, few, **checked),
            lazy_step(16384, "half", lengths, 250, shape=QWQ_32B, **few),
        ],
    }


def main() -> None:
    everything = "parity,speed,static,stock,fa3,prefill,residual,chunk"
    args, common = arguments(argparse.ArgumentParser(description=__doc__), everything)
    run = Run(args.folder, args.budget_s, common)
    chosen = args.only.split(",")
    steps = [step for name, some in speed_steps().items() if name in chosen for step in some]
    order = [step for name in chosen if name != "parity" for step in speed_steps()[name]]
    run.launch(steps)
    try:
        if "parity" in chosen:
            run_parity(run)
    except Exception as error:  # one step must not cost the others their result
        run.say(f"parity: {type(error).__name__}: {error}")
    run.save()
    run_cells(run, order)
    run.save()
    run.close()
    print("\n" + "\n".join(run.table), flush=True)


if __name__ == "__main__":
    main()
