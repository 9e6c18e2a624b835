"""Dynamic mode with priorities, pauses and salts; its layers are a list, so that the reference knows them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from . import storm
from .dynamic_reference import DynamicReference
from .prompts import random_prompt
from .reference import Comparison
from .server import Server
from .specs import DYNAMIC_LIST, DYNAMIC_SERVERS
from .together import Running, pause_again_and_again, send

pytestmark = [pytest.mark.engine, pytest.mark.served_by(DYNAMIC_LIST)]

LAZY = DYNAMIC_SERVERS[DYNAMIC_LIST]
WINDOW = LAZY.sinks + LAZY.recent


@pytest.fixture(scope="module")
def reference() -> DynamicReference:
    """The score plays no part: nothing asks for a choice."""
    return DynamicReference(LAZY.model(), LAZY.keep, LAZY.sinks, LAZY.recent, "lighttransfer", LAZY.default)


def check(reference: DynamicReference, prompts: Sequence[list[int]], outputs: Sequence[list[int]]) -> None:
    """Each with full attention up to the end of its prompt; short ones have windows from the start."""
    result = Comparison(0, 0, [])
    for prompt, output in zip(prompts, outputs, strict=True):
        rows = len(prompt) if len(prompt) > WINDOW else 0
        reference.compare_output(result, prompt, output, LAZY.default, rows)
    result.assert_equal()


def assert_returned(server: Server) -> None:
    """Slots, sink sets and layer sets."""
    storm.assert_all_returned(server)
    sets = server.lighttransfer()["layer_sets"]
    assert sets["requests"] == sets["stored"] == 0, sets


def test_paused_in_place(server: Server, reference: DynamicReference) -> None:
    """A prompt that waits staged between two chunks waits on, and its answer is the same."""
    rng = random.Random(1)
    server.flush_cache()
    jobs = [(random_prompt(length, rng), 200, {}) for length in (5, 70, 300, 900, 1500)]
    with Running(server, jobs) as running:
        running.wait_for_tokens()
        assert pause_again_and_again(server, running, "in_place", 4) > 0, "nothing was left to be paused"
        outputs = running.outputs()
    check(reference, [job[0] for job in jobs], outputs)
    assert_returned(server)


def test_retracted_by_a_pause_and_by_priority(server: Server, reference: DynamicReference) -> None:
    """Who is thrown out comes back and finishes; who threw it out is right; nothing is left behind."""
    rng = random.Random(2)
    server.flush_cache()
    slow = [(random_prompt(rng.randint(20, 400), rng), 200, {"priority": 0}) for _ in range(10)]
    urgent = [(random_prompt(rng.randint(20, 400), rng), 8, {"priority": 20}) for _ in range(6)]
    with Running(server, slow) as running:
        running.wait_for_tokens()
        server.post("/pause_generation", {"mode": "retract"}).raise_for_status()
        assert not running.finished
        server.post("/continue_generation", {}).raise_for_status()
        replies = send(server, urgent)
        assert not running.finished, "no urgent request was served before a slow one had ended"
        assert [len(output) for output in running.outputs()] == [200] * len(slow)
    check(reference, [job[0] for job in urgent], [reply.tokens for reply in replies])
    assert_returned(server)


@pytest.mark.parametrize("field", ["cache_salt", "extra_key"])
def test_salted_prompts_are_not_shared(field: str, server: Server, reference: DynamicReference) -> None:
    """The prompt of one salt or key is a miss for another and a hit for its own."""
    prompt = random_prompt(300, random.Random(3))
    server.flush_cache()
    replies = [
        server.generate(prompt, 16, **({field: salt} if salt else {})) for salt in ("a", "b", None, "a")
    ]
    assert [reply.cached > 200 for reply in replies] == [False, False, False, True], replies
    check(reference, [prompt] * 3, [reply.tokens for reply in replies[:3]])
