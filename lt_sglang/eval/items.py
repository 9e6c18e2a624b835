"""One question to a model, and the tokenizer it is written with."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lt_sglang.config import MAX_TOKENS
from lt_sglang.errors import LightTransferError


class Tokenizer(Protocol):
    """What prompts need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special tokens."""

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, special tokens left out."""

    def chat(self, text: str) -> list[int]:
        """Token ids of ``text`` as a user's turn, up to where the answer begins."""

    @property
    def prefix(self) -> list[int]:
        """What the model's own tokenizer puts before a text (a BOS token, or nothing)."""


@dataclass(frozen=True)
class Item:
    """One prompt with its reference answers.

    task: name of the task, a row of the report.
    prompt: token ids. Every engine of a comparison gets the same ones.
    answers: accepted answers; what counts as correct is the task's metric.
    new_tokens: tokens to generate, greedily.
    metric: name of a metric (``lt_sglang.eval.metrics``).
    cell: further coordinates, such as tokens and depth.
    details: what a metric needs besides (LongBench's class names).
    benchmark: whose table the task is in; "" for those of none.
    """

    task: str
    prompt: tuple[int, ...]
    answers: tuple[str, ...]
    new_tokens: int
    metric: str
    cell: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    benchmark: str = ""


class HfTokenizer:
    """A Hugging Face tokenizer. Raises LightTransferError if ``model`` has none."""

    def __init__(self, model: str) -> None:
        try:
            from transformers import AutoTokenizer

            # Whether a prompt is too long is the engine's to say.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(Path(model).expanduser()), model_max_length=MAX_TOKENS
            )
        except (OSError, ValueError) as error:
            raise LightTransferError(f"--tokenizer {model}: cannot be loaded ({error})") from None
        self.prefix: list[int] = list(self._tokenizer("")["input_ids"])

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special tokens."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def chat(self, text: str) -> list[int]:
        """Raises LightTransferError if the model has no chat template."""
        if not self._tokenizer.chat_template:
            raise LightTransferError("--chat: the tokenizer has no chat template")
        turn = [{"role": "user", "content": text}]
        ids = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        return list(ids)


def rng_of(seed: int, *parts: object) -> random.Random:
    """A generator of its own for each trial, the same in every process and under every version of Python."""
    return random.Random(":".join(map(str, (seed, *parts))))
