"""The float32 model that engines on a GPU are held against, and the errors of what they scored."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from tests.lazy_queue import popped_layers

SINK, RECENT = 4, 252
LAYERS = 6
KEEP = 3
LAST = 32  # queries whose attention the paper's score looks at
LENGTHS = (1, 17, 252, 256, 257, 300, 900, 1500, 2048, 3000, 5000)
NEW_TOKENS = 64
Outs = list[dict[str, Any]]


def make_model(folder: Path) -> Path:
    """A seeded Llama with head_dim 128, 8 query and 2 kv heads, 6 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(7)
        config = LlamaConfig(
            vocab_size=2048,
            hidden_size=1024,
            intermediate_size=2048,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=128,
            max_position_embeddings=16384,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.06,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    """Seeded prompts of LENGTHS tokens."""
    rng = random.Random(3)
    return [[rng.randrange(10, 2048) for _ in range(length)] for length in LENGTHS]


def continuations() -> list[list[int]]:
    """Seeded tokens that follow the prompts."""
    rng = random.Random(4)
    return [[rng.randrange(10, 2048) for _ in range(NEW_TOKENS)] for _ in LENGTHS]


class Reference:
    """The float32 model with eager attention; ``lazy`` layers see an explicit streaming mask."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.to(device).eval()
        self._lazy: Collection[int] = ()
        self._mask: torch.Tensor | None = None
        self._ratios: list[float] | None = None
        self._boundary = 0
        for layer in self.model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._set_mask, with_kwargs=True)
            layer.self_attn.register_forward_hook(self._take_ratio)

    def _set_mask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if module.layer_idx in self._lazy:
            kwargs["attention_mask"] = self._mask
        return args, kwargs

    def _take_ratio(self, module: Any, args: Any, output: Any) -> None:
        if self._ratios is None:
            return
        weights = output[1][0, :, max(self._boundary - LAST, 0) :]
        key = torch.arange(self._boundary, device=weights.device)
        kept = (key < SINK) | (key >= self._boundary - RECENT)
        self._ratios.append(weights[:, :, kept].sum(-1).mean().item())

    @torch.no_grad()
    def score(self, prompt: list[int]) -> list[float]:
        """The lazy ratio of every layer, from its own attention weights."""
        self._lazy, self._ratios, self._boundary = (), [], len(prompt)
        try:
            self.model(torch.tensor([prompt], device=self.device), logits_to_keep=1)
            return self._ratios
        finally:
            self._ratios = None

    @torch.no_grad()
    def logprobs(self, tokens: list[int], lazy: Collection[int], prompt: int = 0) -> torch.Tensor:
        """float32 [len - 1]: log-probability of each token given those before it.

        prompt: queries from there on are streaming in ``lazy`` layers; 0: all are, as in static mode.
        """
        self._lazy = frozenset(lazy)
        at = torch.arange(len(tokens), device=self.device)
        gap = at[:, None] - at[None, :]
        near = (at[None, :] < SINK) | (gap < RECENT) | (at[:, None] < prompt)
        mask = torch.zeros(gap.shape, device=self.device)
        self._mask = mask.masked_fill_(~((gap >= 0) & near), float("-inf"))[None, None]
        ids = torch.tensor([tokens], device=self.device)
        logits = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        return logits.gather(1, ids[0, 1:, None])[:, 0].cpu()


# Of an output and its prompt's length: the layers that are lazy, and from which query on.
Lazy = Callable[[dict[str, Any], int], tuple[Collection[int], int]]


def fixed(layers: Collection[int]) -> Lazy:
    """Static mode: the same layers for every request, in prefill too."""
    return lambda out, prompt: (layers, 0)


def decided(out: dict[str, Any], prompt: int) -> tuple[Collection[int], int]:
    """Dynamic mode: the layers that the engine chose, behind the prompt."""
    return out["decision"]["lazy_layers"], prompt


def others(out: dict[str, Any], prompt: int) -> tuple[Collection[int], int]:
    """Wrong on purpose: the layers that the engine did not choose."""
    return set(range(LAYERS)) - set(out["decision"]["lazy_layers"]), prompt


def errors(scored: Outs, reference: Reference, lazy: Lazy) -> dict[str, Any]:
    """Mean, 99th percentile and largest difference of log-probabilities over prompts and new tokens."""
    differences = []
    for prompt, out in zip(prompts(), scored, strict=True):
        want = reference.logprobs(prompt + out["output_ids"], *lazy(out, len(prompt)))
        got = torch.tensor(out["input_logprobs"] + out["output_logprobs"])
        differences.append((got - want).abs())
    return {**_summary(differences), "cached": sum(out["cached_tokens"] for out in scored)}


def hit_errors(outs: Outs, reference: Reference, lazy: Lazy) -> dict[str, Any]:
    """Errors on the continuations whose prompts were found in the cache whole; hits: how many."""
    differences = []
    for prompt, continuation, out in zip(prompts(), continuations(), outs, strict=True):
        count = len(prompt)
        if count > SINK + RECENT and out["cached_tokens"] >= count:
            want = reference.logprobs(prompt + continuation, *lazy(out, count))[count:]
            differences.append((torch.tensor(out["logprobs"]) - want).abs())
    return {**(_summary(differences) if differences else {}), "hits": len(differences)}


def _summary(differences: list[torch.Tensor]) -> dict[str, Any]:
    every = torch.cat(differences)
    return {"mean": every.mean().item(), "p99": every.quantile(0.99).item(), "max": every.max().item()}


def choices(scored: Outs, reference: Reference) -> dict[str, Any]:
    """How the layers chosen by the paper's score compare with float32's.

    A choice may differ only where the two layers' scores are closer than bfloat16's error on them.
    """
    equal, excused, wrong, largest = 0, 0, [], 0.0
    for prompt, out in zip(prompts(), scored, strict=True):
        lazy, told = out["decision"]["lazy_layers"], out["decision"]["laziness"]
        if told is None:
            continue
        ratios = reference.score(prompt)
        off = [abs(a - b) for a, b in zip(ratios, told, strict=True)]
        largest = max(largest, *off)
        expected = sorted(popped_layers(ratios, KEEP))
        if expected == lazy:
            equal += 1
            continue
        swapped = [ratios[one] for one in set(expected) ^ set(lazy)]
        spread = max(swapped) - min(swapped)
        if spread <= 2 * max(off):
            excused += 1
        else:
            wrong.append([len(prompt), expected, lazy, spread, max(off)])
    return {
        "choices_equal": equal,
        "choices_within_noise": excused,
        "choices_wrong": wrong,
        "largest_score_error": largest,
    }


def compare_copies(scored: Outs) -> dict[str, Any]:
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
            sides = (zip(one["output_ids"], one["output_logprobs"], strict=True) for one in (copy, alone))
            for (token, mine), (other, theirs) in zip(*sides, strict=True):
                if token != other:
                    break
                largest = max(largest, abs(mine - theirs))
    return {"of": of, "layers_equal": layers, "outputs_equal": outputs, "largest_difference": largest}
