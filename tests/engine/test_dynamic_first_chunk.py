"""Decisions at the end of the first chunk, and a thousand requests: nothing leaks, nothing goes wrong.

``make test`` sends half of the thousand, ``make test-slow`` all.

Windows slide at every step (specs.RESTLESS).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from . import storm
from .dynamic_reference import LAST_QUERIES, Choices, DynamicReference
from .prompts import random_prompt
from .reference import Comparison
from .server import Reply, Server
from .server_flags import CHUNK
from .specs import DYNAMIC_SERVERS, FIRST_CHUNK
from .test_dynamic import make_reference

pytestmark = [pytest.mark.engine, pytest.mark.served_by(FIRST_CHUNK)]

LAZY = DYNAMIC_SERVERS[FIRST_CHUNK]
BLOCK = LAZY.sinks + LAZY.recent
FIRST_QUERIES = 128
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def reference() -> DynamicReference:
    """Made once."""
    return make_reference(FIRST_CHUNK)


def candidates(reference: DynamicReference, prompt: Sequence[int], reply: Reply) -> list[int]:
    """Where the chunk may have ended that decided: ends that fit the scores told.

    A chunk of a batch ends anywhere; ends below a window and 128 queries wait for the next chunk. The scores
    of neighbours can be too close to tell.
    """
    told = reply.choice["laziness"]
    fitting = []
    ends = range(BLOCK + FIRST_QUERIES, min(BLOCK + FIRST_QUERIES - 1 + CHUNK, len(prompt) - 1) + 1)
    if ends:
        scores = reference.scores_by_end(prompt, ends, FIRST_QUERIES)
        fitting = [end for end in ends if reference.same_scores(told, scores[end])]
    if reference.same_scores(told, reference.scores(prompt, len(prompt))):
        fitting.append(len(prompt))
    return fitting


def check(
    reference: DynamicReference,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Reply],
    ends: Sequence[int] | None = None,
) -> list[int]:
    """Choices and outputs of requests without a cached prefix; where each was decided (0: by default).

    ends: where they must have been decided; None: where it fits.
    """
    choices, outputs, found = Choices(), Comparison(0, 0, []), []
    for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        assert reply.choice is not None and reply.cached == 0
        lazy = reply.choice["lazy_layers"]
        if len(prompt) <= BLOCK:
            assert (reply.choice["origin"], lazy) == ("default", list(LAZY.default))
            found.append(0)
            reference.compare_output(outputs, prompt, reply.tokens, lazy, 0)
            continue
        likely = candidates(reference, prompt, reply) if ends is None else [ends[number]]
        assert likely, f"prompt of {len(prompt)}: no chunk gives the scores {reply.choice['laziness']}"
        for end in likely:
            result = Comparison(0, 0, [])
            reference.compare_output(result, prompt, reply.tokens, lazy, end)
            if not result.wrong:
                break
        outputs = Comparison(
            outputs.tokens + result.tokens, outputs.ties + result.ties, outputs.wrong + result.wrong
        )
        queries = LAST_QUERIES if end == len(prompt) else FIRST_QUERIES
        reference.compare_choice(choices, prompt, reply.choice, end, queries)
        found.append(end)
    choices.assert_equal()
    outputs.assert_equal()
    return found


def test_one_at_a_time(server: Server, reference: DynamicReference) -> None:
    """From the second chunk on, lazy layers stream; a prompt of one chunk is decided at its end."""
    rng = random.Random(1)
    server.flush_cache()
    lengths = [1, 63, 64, 65, 191, 192, 255, 256, 257, 258, 300, 512, 513, 900, 2000, 3000]
    prompts = [random_prompt(length, rng) for length in lengths]
    replies = [server.generate(prompt, NEW_TOKENS, ask=True) for prompt in prompts]
    check(reference, prompts, replies, [min(length, CHUNK) for length in lengths])

    # The comparison can fail: decided at the prompt's end, or full attention to the end of the prompt.
    for prompt, reply in zip(prompts[-3:], replies[-3:], strict=True):
        control = Choices()
        reference.compare_choice(control, prompt, reply.choice, len(prompt), LAST_QUERIES)
        assert control.wrong
        outputs = Comparison(0, 0, [])
        reference.compare_output(outputs, prompt, reply.tokens, reply.choice["lazy_layers"], len(prompt))
        outputs.assert_differs()


def test_batched(server: Server, reference: DynamicReference) -> None:
    """Chunks end anywhere, some too early to decide; that place too is found again from the scores."""
    rng = random.Random(2)
    server.flush_cache()
    retracted = server.log_text().count("Retract requests")
    prompts = [random_prompt(length, rng) for length in (700, 90, 600, 130, 450, 300)]
    replies = server.generate_all(prompts, 8, ask=True)
    assert server.log_text().count("Retract requests") == retracted
    ends = check(reference, prompts, replies)
    assert any(end not in (CHUNK, len(prompt)) for end, prompt in zip(ends, prompts, strict=True)), ends


@pytest.mark.parametrize(
    "storms", [pytest.param(2, id="part"), pytest.param(4, id="whole", marks=pytest.mark.slow)]
)
def test_a_thousand_requests(storms: int, server: Server, reference: DynamicReference) -> None:
    """Shared beginnings, aborts and dropped streams; every layer set and slot comes back."""
    for seed in range(storms):
        jobs = storm.storm(count=250, longest=600, longest_output=60, seed=100 + seed)
        outputs = storm.run(server, jobs, clients=32)
        whole = [len(out) == job.new_tokens for job, out in zip(jobs, outputs, strict=True)]
        cut = [job.abort or job.drop_after is not None for job in jobs]
        assert all(done or early for done, early in zip(whole, cut, strict=True))
    storm.assert_all_returned(server)
    sets = server.lighttransfer()["layer_sets"]
    assert sets["requests"] == sets["stored"] == 0, sets
    assert min(sets["decided"], sets["inherited"], sets["short"]) > 0, sets

    rng = random.Random(3)
    prompts = [random_prompt(length, rng) for length in (40, 100, 400, 900)]
    replies = [server.generate(prompt, NEW_TOKENS, ask=True) for prompt in prompts]
    check(reference, prompts, replies, [min(len(prompt), CHUNK) for prompt in prompts])
