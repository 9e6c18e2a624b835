"""Greedy outputs equal an independent reference, for every family, window and kind of layer set.

Forty prompts a family, sent at once to memory too small to hold them, so that every slot serves many
requests. That the comparison can fail is shown by a reference with full attention, which must disagree.
"""

from __future__ import annotations

import pytest

from .models import NUM_LAYERS
from .prompts import mixed_prompts
from .reference import Reference
from .server import Server
from .server_flags import LONGEST_PROMPT, NEW_TOKENS
from .specs import LAZY_SERVERS, NO_RADIX, ONE_FULL, PAGES, RADIX, SHARED_EXPERT

pytestmark = pytest.mark.engine

FAMILIES = [RADIX, NO_RADIX, "qwen2", "qwen3", "qwen2_moe", "mixtral", PAGES, ONE_FULL]
PROMPTS = 40
CONTROLS = 3


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.served_by(name), id=name) for name in FAMILIES]
)
def test_outputs_equal_the_reference(name: str, server: Server) -> None:
    """Prompts of 1 to 3,000 tokens, edge lengths included, 64 new tokens each."""
    lazy = LAZY_SERVERS[name]
    prompts = mixed_prompts(lazy.sinks, lazy.recent, LONGEST_PROMPT, PROMPTS, seed=len(name))
    replies = server.generate_all(prompts, NEW_TOKENS)
    outputs = [reply.tokens for reply in replies]
    assert all(len(output) == NEW_TOKENS for output in outputs)
    assert len({token for output in outputs for token in output}) > 100, "outputs too uniform to tell errors"

    reference = Reference(lazy.model(), lazy.layers, lazy.sinks, lazy.recent)
    reference.compare(prompts, outputs).assert_equal()
    _assert_slots_were_reused(server, sum(map(len, prompts)) + len(prompts) * NEW_TOKENS)

    by_length = sorted(zip(prompts, outputs, strict=True), key=lambda pair: len(pair[0]))[-CONTROLS:]
    full = Reference(lazy.model(), (), lazy.sinks, lazy.recent)
    control = full.compare(*zip(*by_length, strict=True))
    control.assert_differs()  # full attention does not pass


@pytest.mark.served_by(SHARED_EXPERT)
def test_a_shared_expert_beside_the_others(server: Server) -> None:
    """Qwen1.5-MoE's shape; few tokens, as SGLang gates that expert in a Triton kernel, here interpreted."""
    lazy = LAZY_SERVERS[SHARED_EXPERT]
    prompts = mixed_prompts(lazy.sinks, lazy.recent, longest=400, count=15, seed=2)
    outputs = [reply.tokens for reply in server.generate_all(prompts, 16)]
    assert len({token for output in outputs for token in output}) > 50, "outputs too uniform to tell errors"
    Reference(lazy.model(), lazy.layers, lazy.sinks, lazy.recent).compare(prompts, outputs).assert_equal()
    _assert_slots_were_reused(server, sum(map(len, prompts)) + len(prompts) * 16)

    Reference(lazy.model(), (), lazy.sinks, lazy.recent).compare(prompts, outputs).assert_differs()
    silent = Reference(lazy.model(), lazy.layers, lazy.sinks, lazy.recent)
    assert silent.scale("mlp.shared_expert.down_proj.weight", 0.0) == NUM_LAYERS
    silent.compare(prompts, outputs).assert_differs()  # without the shared expert
    open_gate = Reference(lazy.model(), lazy.layers, lazy.sinks, lazy.recent)
    assert open_gate.scale("mlp.shared_expert_gate.weight", 0.0) == NUM_LAYERS
    open_gate.compare(prompts, outputs).assert_differs()  # with a gate that is half open for every token


def _assert_slots_were_reused(server: Server, served: int) -> None:
    """The tokens served exceed what the memory holds, several times."""
    assert served > 4 * server.room(), (served, server.lighttransfer()["memory"])
