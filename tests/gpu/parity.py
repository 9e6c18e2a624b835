"""Parity on a GPU: SGLang in bfloat16 with lazy layers against transformers in float32.

The bound is not chosen but measured in the same run: the same engine without lazy layers (stock SGLang,
its flashinfer backend) against the same float32 model with full attention gives the noise of bfloat16.
The error with lazy layers may be 1.25 times that (mean) and 1.5 times (largest of all tokens).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SINK, RECENT = 4, 252
LAZY = (1, 2, 4)
LENGTHS = (1, 17, 252, 256, 257, 300, 900, 1500, 2048, 3000, 5000)
NEW_TOKENS = 64


def make_model(folder: Path) -> Path:
    """A seeded Llama with head_dim 128, 8 query and 2 kv heads, 6 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(7)
        config = LlamaConfig(
            vocab_size=2048,
            hidden_size=1024,
            intermediate_size=2048,
            num_hidden_layers=6,
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


def hits_task() -> dict[str, Any]:
    """Prompts, then prompts and continuations, which find their prompts in the prefix cache."""
    return {"kind": "continuations", "prompts": prompts(), "continuations": continuations(), "top": 0}


def hit_errors(
    outs: list[dict[str, Any]], expected: Callable[[list[int], int, dict[str, Any]], torch.Tensor]
) -> dict[str, float]:
    """Errors on the continuations whose prompts were found in the cache whole; hits: how many.

    expected: log-probabilities of all tokens but the first, of tokens, the prompt's length and the output.
    """
    differences = []
    for prompt, continuation, out in zip(prompts(), continuations(), outs, strict=True):
        count = len(prompt)
        if count > SINK + RECENT and out["cached_tokens"] >= count:
            want = expected(prompt + continuation, count, out)[count:]
            differences.append((torch.tensor(out["logprobs"]) - want).abs())
    if not differences:
        return {"hits": 0}
    every = torch.cat(differences)
    return {"mean": every.mean().item(), "max": every.max().item(), "hits": len(differences)}


class Reference:
    """The float32 model; ``lazy`` layers see an explicit streaming mask."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model.to(device).eval()
        self._mask: torch.Tensor | None = None
        for layer in self.model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._set_mask, with_kwargs=True)
        self.lazy: frozenset[int] = frozenset()

    def _set_mask(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module.layer_idx in self.lazy:
            kwargs["attention_mask"] = self._mask
        return args, kwargs

    @torch.no_grad()
    def logprobs(self, tokens: list[int], lazy: tuple[int, ...]) -> torch.Tensor:
        """float32 [len - 1]: log-probability of each token given those before it."""
        self.lazy = frozenset(lazy)
        count = len(tokens)
        at = torch.arange(count, device=self.device)
        gap = at[:, None] - at[None, :]
        seen = (gap >= 0) & ((at[None, :] < SINK) | (gap < RECENT))
        self._mask = torch.zeros(seen.shape, device=self.device).masked_fill_(~seen, float("-inf"))[
            None, None
        ]
        ids = torch.tensor([tokens], device=self.device)
        logits = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        return logits.gather(1, ids[0, 1:, None])[:, 0].cpu()


# A label, what an engine scored, the layers that are lazy in the reference.
Work = tuple[str, list[dict[str, Any]], tuple[int, ...]]


def compare(folder: Path, work: list[Work], hits: list[Work]) -> dict[str, dict[str, float]]:
    """``errors`` of every piece of work and ``hit_errors`` of ``hits``."""
    reference = Reference(folder, "cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for label, scored, lazy in work:
        found[label] = errors(scored, reference, lazy)
        found[label]["cached"] = sum(out["cached_tokens"] for out in scored)
    for label, outs, lazy in hits:
        found[label] = hit_errors(outs, lambda tokens, *_, lazy=lazy: reference.logprobs(tokens, lazy))
    return found


def errors(scored: list[dict[str, Any]], reference: Reference, lazy: tuple[int, ...]) -> dict[str, float]:
    """Mean and largest absolute difference of log-probabilities over prompt and generated tokens."""
    differences = []
    for prompt, out in zip(prompts(), scored, strict=True):
        want = reference.logprobs(prompt + out["output_ids"], lazy)
        got = torch.tensor(out["input_logprobs"] + out["output_logprobs"])
        differences.append((got - want).abs())
    every = torch.cat(differences)
    return {"mean": every.mean().item(), "p99": every.quantile(0.99).item(), "max": every.max().item()}
