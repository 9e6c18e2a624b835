"""The reference: transformers with an explicit attention mask for each lazy layer.

Written from the definition alone and shares no code with lt_sglang: in a lazy layer query i sees keys
j <= i with j < w_sink or i - j < w_recent; keys keep the positions they were computed at. Teacher-forced:
one forward over prompt + output gives the greedy choice at every position of the output.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# Two float32 engines may differ on which of two such tokens is the greedy one.
TIE_MARGIN = 1e-4
TOKENS_PER_TIE = 2000
# No rounding turns a choice by this margin: what a test takes for granted must hold by it.
CLEAR_MARGIN = 100 * TIE_MARGIN


@dataclass
class Comparison:
    """Outputs held against the reference.

    tokens: how many were compared. ties: how many differ from the greedy choice by less than
    TIE_MARGIN. wrong: (prompt length, position in the output, margin) of all other differences.
    """

    tokens: int
    ties: int
    wrong: list[tuple[int, int, float]]

    def assert_equal(self) -> None:
        """Equal up to near-ties, at most one in TOKENS_PER_TIE tokens."""
        assert not self.wrong, (
            f"{len(self.wrong)} of {self.tokens} tokens differ from the reference; "
            f"(prompt length, position, margin): {self.wrong[:8]}"
        )
        assert self.ties <= math.ceil(self.tokens / TOKENS_PER_TIE), (
            f"{self.ties} near-ties in {self.tokens} tokens"
        )

    def assert_differs(self) -> None:
        """What a control must do: at least one token is wrong by a margin that no rounding makes."""
        widest = max((margin for _, _, margin in self.wrong), default=0.0)
        assert widest > CLEAR_MARGIN, f"the comparison cannot fail: widest margin {widest}, {self.wrong[:4]}"


def missed(logits: torch.Tensor, output: Sequence[int]) -> list[float]:
    """By how much the greedy choice of ``logits`` [len(output), vocabulary] beats each output token."""
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    return (logits.max(dim=1).values - chosen).tolist()


class Reference:
    """A transformers model whose layers in ``lazy_layers`` attend to sink + recent tokens only.

    threads: one is best for a tiny model, above all while the next server starts beside it.
    adapter: a LoRA adapter's folder, merged into the weights.
    """

    def __init__(
        self,
        model: Path,
        lazy_layers: Collection[int],
        sink_tokens: int,
        recent_tokens: int,
        *,
        threads: int = 1,
        adapter: Path | None = None,
    ) -> None:
        self.threads = threads
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens
        self._mask: torch.Tensor | None = None
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        if adapter is not None:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, adapter).merge_and_unload()
        layers = self._model.model.layers
        assert all(0 <= layer < len(layers) for layer in lazy_layers)
        for layer in lazy_layers:
            layers[layer].self_attn.register_forward_pre_hook(self._use_mask, with_kwargs=True)

    def scale(self, suffix: str, factor: float) -> int:
        """Multiply the parameters whose names end so, for a control; returns how many there are."""
        found = [value for name, value in self._model.named_parameters() if name.endswith(suffix)]
        with torch.no_grad():
            for value in found:
                value.mul_(factor)
        return len(found)

    def compare(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> Comparison:
        """Hold greedy outputs against the reference, position by position."""
        result = Comparison(0, 0, [])
        for prompt, output in zip(prompts, outputs, strict=True):
            margins = self.margins(prompt, output)
            result.tokens += len(output)
            for position, margin in enumerate(margins):
                if 0 < margin < TIE_MARGIN:
                    result.ties += 1
                elif margin > 0:
                    result.wrong.append((len(prompt), position, margin))
        return result

    def margins(self, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
        """By how much the greedy choice beats each output token, given those before; 0 where it is it."""
        return missed(self._logits(prompt, output), output)

    def is_clear(self, prompt: Sequence[int], output: Sequence[int]) -> bool:
        """Whether every token of a greedy output beats all others by CLEAR_MARGIN: no rounding changes it."""
        two = self._logits(prompt, output).topk(2, dim=1)
        same = two.indices[:, 0].tolist() == list(output)
        return same and float((two.values[:, 0] - two.values[:, 1]).min()) > CLEAR_MARGIN

    def assert_same(
        self,
        prompts: Sequence[Sequence[int]],
        one: Sequence[Sequence[int]],
        other: Sequence[Sequence[int]],
    ) -> None:
        """Two engines' greedy outputs are equal; where two part there is a near-tie, and that is rare."""
        parted = [
            (prompt, a, b) for prompt, a, b in zip(prompts, one, other, strict=True) if list(a) != list(b)
        ]
        tokens = sum(map(len, one))
        assert len(parted) <= math.ceil(tokens / TOKENS_PER_TIE), f"{len(parted)} outputs differ"
        for prompt, a, b in parted:
            first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            assert first is not None, f"outputs of {len(a)} and {len(b)} tokens"
            margins = [self.margins(prompt, output[: first + 1])[first] for output in (a, b)]
            assert max(margins) < TIE_MARGIN, (len(prompt), first, margins)

    def next_probabilities(
        self, tokens: Sequence[int], vectors: Mapping[int, Sequence[float]]
    ) -> list[float]:
        """Of the token behind ``tokens``; vectors: position -> what stands there instead of its embedding."""
        torch.set_num_threads(self.threads)
        self._mask = streaming_mask(len(tokens), self.sink_tokens, self.recent_tokens)
        with torch.inference_mode():
            rows = self._model.get_input_embeddings()(torch.tensor([list(tokens)])).clone()
            for position, vector in vectors.items():
                rows[0, position] = torch.tensor(vector)
            logits = self._model(inputs_embeds=rows, logits_to_keep=1, use_cache=False).logits[0, -1]
        return list(logits.double().softmax(0).tolist())

    def _logits(self, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """float32 [len(output), vocabulary]: what each token was chosen from, given those before."""
        torch.set_num_threads(self.threads)
        tokens = torch.tensor([[*prompt, *output]])
        self._mask = streaming_mask(tokens.shape[1], self.sink_tokens, self.recent_tokens)
        with torch.inference_mode():
            logits = self._model(tokens, logits_to_keep=len(output) + 1, use_cache=False).logits[0, :-1]
        return torch.as_tensor(logits)

    def run(self, tokens: Sequence[int], **options: Any) -> Any:
        """One forward over ``tokens``; what transformers returns, batch size 1."""
        torch.set_num_threads(self.threads)
        self._mask = streaming_mask(len(tokens), self.sink_tokens, self.recent_tokens)
        if "inputs_embeds" not in options:
            options["input_ids"] = torch.tensor([[*tokens]])
        with torch.inference_mode():
            return self._model(use_cache=False, **options)

    def embeddings(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of each token, float32 [tokens, hidden]; a copy."""
        with torch.no_grad():
            return self._model.get_input_embeddings()(torch.tensor(tokens)).clone()

    def _use_mask(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert "attention_mask" in kwargs, "this model passes its mask in another way"
        return args, {**kwargs, "attention_mask": self._mask}


def streaming_mask(length: int, sink_tokens: int, recent_tokens: int) -> torch.Tensor:
    """Additive mask [1, 1, length, length] of a lazy layer."""
    query = torch.arange(length)[:, None]
    key = torch.arange(length)[None, :]
    seen = (key <= query) & ((key < sink_tokens) | (query - key < recent_tokens))
    return torch.zeros(length, length).masked_fill_(~seen, torch.finfo(torch.float32).min)[None, None]
