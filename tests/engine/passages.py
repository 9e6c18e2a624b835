"""Prompts of text that ask for a pass key they stated, for the demo model."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lt_sglang.demo.smollm2 import DemoModelMissing, ensure_model, find_gguf
from lt_sglang.eval.tasks.haystack import SENTENCES

DIGITS = 5


def demo_missing() -> bool:
    """Whether the demo model's weights are not installed."""
    try:
        find_gguf()
    except DemoModelMissing:
        return True
    return False


@cache
def tokenizer(model: Path | None = None) -> Any:
    """The demo model's."""
    return AutoTokenizer.from_pretrained(model or ensure_model())


def passage(tokens: int, rng: random.Random, depth: float = 0.0) -> tuple[list[int], str]:
    """A prompt of ``tokens`` tokens that ends in "The pass key is", and the key.

    depth: where among the filler the key is stated; 0 is the beginning, 1 right before the question.
    """

    def ids(text: str) -> list[int]:
        return tokenizer()(text)["input_ids"]

    key = "".join(rng.choice("0123456789") for _ in range(DIGITS))
    statement = ids(f" The pass key is {key}. Remember it. {key} is the pass key. ")
    question = ids(" What is the pass key? The pass key is")
    filler: list[int] = []
    while len(filler) < tokens:
        filler += ids(" ".join(rng.choice(SENTENCES) for _ in range(16)) + " ")
    filler = filler[: tokens - len(statement) - len(question)]
    cut = round(depth * len(filler))
    return [*filler[:cut], *statement, *filler[cut:], *question], key
