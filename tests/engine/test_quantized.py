"""Quantized weights: the scores of dynamic mode go through a layer's own method, not through its weight."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from .dynamic_reference import LAST_QUERIES, Choices, DynamicReference
from .models import ensure_model
from .packed import NAME, ensure_rounded_model
from .prompts import random_prompt
from .reference import Comparison
from .server import running
from .specs import DYNAMIC, DYNAMIC_SERVERS

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_outputs_equal_the_reference(tmp_path: Path) -> None:
    """Choices by residual error, and outputs, of a model whose weights are packed int8 (packed.py)."""
    lazy = replace(DYNAMIC_SERVERS[DYNAMIC], score="residual-error")
    spec = replace(
        lazy.spec,
        name=NAME,
        flags=(*lazy.flags, "--quantization", NAME),
        beside="tests.engine.packed:register",
    )
    model = ensure_model("llama")

    def make(folder: Path) -> DynamicReference:
        return DynamicReference(folder, lazy.keep, lazy.sinks, lazy.recent, lazy.score, lazy.default)

    rng = random.Random(1)
    prompts = [random_prompt(length, rng) for length in (30, 65, 200, 256, 300, 700, 1500)]
    with running(spec, tmp_path) as server:
        replies = [server.generate(prompt, 32, ask=True) for prompt in prompts]
    reference, choices, outputs = make(ensure_rounded_model(model)), Choices(), Comparison(0, 0, [])
    original = Comparison(0, 0, [])
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.choice is not None
        chosen, long = reply.choice["lazy_layers"], len(prompt) > lazy.sinks + lazy.recent
        if long:
            reference.compare_choice(choices, prompt, reply.choice, len(prompt), LAST_QUERIES)
        reference.compare_output(outputs, prompt, reply.tokens, chosen, len(prompt) if long else 0)
        make(model).compare_output(original, prompt, reply.tokens, chosen, len(prompt) if long else 0)
    choices.assert_equal()
    outputs.assert_equal()
    assert choices.compared > 4
    assert original.wrong, "the weights that were not packed pass as well"
