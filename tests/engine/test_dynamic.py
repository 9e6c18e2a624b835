"""Dynamic mode: chosen layers and greedy outputs equal an independent reference.

Prompts are sent at once to memory too small to hold them, with chunks of 256 tokens: some are decided in one
chunk, some wait staged beside others that decode, and slots serve many requests.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest

from .dynamic_reference import LAST_QUERIES, Choices, DynamicReference
from .prompts import mixed_prompts, random_prompt
from .reference import Comparison
from .server import Reply, Server
from .server_flags import CHUNK, LONGEST_PROMPT, NEW_TOKENS
from .specs import DYNAMIC, DYNAMIC_LIST, DYNAMIC_ONE_FULL, DYNAMIC_PAGES, DYNAMIC_SERVERS

pytestmark = [pytest.mark.engine, pytest.mark.served_by(DYNAMIC)]

LAZY = DYNAMIC_SERVERS[DYNAMIC]
PROMPTS = 40
CONTROLS = 4
# A last chunk shorter than the queries that are scored, one as long, one longer.
LAST_CHUNKS = [k * CHUNK + n for k, n in ((1, 1), (1, 16), (1, 31), (2, 2), (2, 32), (3, 33), (5, 7))]


@cache
def prompts() -> list[list[int]]:
    """Forty, of 1 to 3,000 tokens, in random order."""
    rng = random.Random(5)
    mixed = mixed_prompts(LAZY.sinks, LAZY.recent, LONGEST_PROMPT, PROMPTS - len(LAST_CHUNKS), seed=41)
    made = [*mixed, *(random_prompt(length, rng) for length in LAST_CHUNKS)]
    rng.shuffle(made)
    return made


@pytest.fixture(scope="module")
def reference() -> DynamicReference:
    """Made once."""
    return make_reference(DYNAMIC)


def make_reference(name: str, threads: int = 1) -> DynamicReference:
    """The reference of a server."""
    lazy = DYNAMIC_SERVERS[name]
    return DynamicReference(
        lazy.model(),
        lazy.keep,
        lazy.sinks,
        lazy.recent,
        lazy.score,
        lazy.default,
        threads=threads,
        queries=lazy.last_queries,
    )


def check(
    reference: DynamicReference, asked: Sequence[Sequence[int]], replies: Sequence[Reply]
) -> tuple[Choices, Comparison]:
    """Requests without a cached prefix, decided at the ends of their prompts."""
    choices, outputs = Choices(), Comparison(0, 0, [])
    short = reference.sink_tokens + reference.recent_tokens
    for prompt, reply in zip(asked, replies, strict=True):
        assert reply.choice is not None and reply.cached == 0
        lazy = reply.choice["lazy_layers"]
        if len(prompt) <= short:
            assert reply.choice == {
                "lazy_layers": list(reference.default),
                "laziness": None,
                "origin": "default",
            }
            reference.compare_output(outputs, prompt, reply.tokens, lazy, 0)
            continue
        assert reply.choice["origin"] == "prompt", reply.choice
        reference.compare_choice(choices, prompt, reply.choice, len(prompt), reference.queries)
        reference.compare_output(outputs, prompt, reply.tokens, lazy, len(prompt))
    return choices, outputs


def test_choices_and_outputs_equal_the_reference(server: Server, reference: DynamicReference) -> None:
    """Prompts of 1 to 3,000 tokens, edge lengths included, 64 new tokens each, batched with one another."""
    retracted = server.log_text().count("Retract requests")
    server.flush_cache()
    replies = server.generate_all(prompts(), NEW_TOKENS, ask=True)
    assert server.log_text().count("Retract requests") == retracted, "a retracted request is decided again"
    assert all(len(reply.tokens) == NEW_TOKENS for reply in replies)
    choices, outputs = check(reference, prompts(), replies)
    choices.assert_equal()
    outputs.assert_equal()

    # What was compared is worth comparing.
    assert choices.compared > PROMPTS / 2
    chosen = {tuple(reply.choice["lazy_layers"]) for reply in replies if reply.choice["origin"] == "prompt"}
    assert len(chosen) > 5, f"only {chosen}: the sets vary too little to tell errors"
    served = sum(map(len, prompts())) + len(prompts()) * NEW_TOKENS
    assert served > 4 * server.room(), (served, server.lighttransfer()["memory"])

    # And the comparison can fail: other layers, no layers, another boundary.
    long = [(p, r) for p, r in zip(prompts(), replies, strict=True) if len(p) > 600][:CONTROLS]
    assert len(long) == CONTROLS
    for prompt, reply in long:
        lazy = set(reply.choice["lazy_layers"])
        others = set(range(reference.num_layers)) - lazy
        for wrong, full_rows in ((others, len(prompt)), ((), len(prompt)), (lazy, 0)):
            control = Comparison(0, 0, [])
            reference.compare_output(control, prompt, reply.tokens, wrong, full_rows)
            control.assert_differs()
        control = Choices()
        reference.compare_choice(
            control, prompt, {**reply.choice, "lazy_layers": sorted(others)}, len(prompt), LAST_QUERIES
        )
        assert control.wrong
        assert not reference.same_scores(
            reply.choice["laziness"], reference.scores(prompt, len(prompt) - 1)
        ), "one token less gives the same scores"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.served_by(name), id=name)
        for name in (DYNAMIC_PAGES, DYNAMIC_ONE_FULL)
    ],
)
def test_pages_and_layer_counts_without_a_common_divisor(name: str, server: Server) -> None:
    """Whole and staged prompts, and turns that inherit, where a token has rows in several units or pages.

    Scored by more and by fewer queries than by default; a last chunk may be shorter than either.
    """
    reference = make_reference(name)
    assert reference.queries != LAST_QUERIES
    server.flush_cache()
    asked = prompts()[::2]
    replies = server.generate_all(asked, NEW_TOKENS, ask=True)
    choices, outputs = check(reference, asked, replies)
    choices.assert_equal()
    outputs.assert_equal()
    assert choices.compared > len(asked) / 2
    page = server.lighttransfer()["memory"]["demand"]["page_size"]
    known = [(p, r) for p, r in zip(asked, replies, strict=True) if 200 < len(p) < 1200][-CONTROLS:]
    for prompt, reply in known:
        turn = [*prompt, *reply.tokens, 5]
        again = server.generate(turn, NEW_TOKENS, ask=True)
        assert again.cached >= len(prompt) // page * page and again.choice is not None
        assert again.choice["lazy_layers"] == reply.choice["lazy_layers"]
        outputs = Comparison(0, 0, [])
        # Its prompt's first part had full attention, what was decoded and what follows had not.
        reference.compare_output(outputs, turn, again.tokens, again.choice["lazy_layers"], len(prompt))
        outputs.assert_equal()
    assert len(known) == CONTROLS


def _share_documents(server: Server, reference: DynamicReference, rng: random.Random) -> None:
    """Of a document's users the third and all after it have a hit.

    Questions stream in lazy layers, also the second user's, whose prefill stops where the two part.
    """
    for length in (CHUNK - 40, 2 * CHUNK + 30):
        document = random_prompt(length, rng)
        outputs = Comparison(0, 0, [])
        for user in range(5):
            prompt = [*document, *random_prompt(rng.randint(20, 60), rng)]
            reply = server.generate(prompt, NEW_TOKENS, ask=True)
            found = length if user >= 2 else 0
            assert (reply.cached, reply.choice["origin"]) == (found, "prefix" if found else "prompt"), user
            full_rows = length if user else len(prompt)
            reference.compare_output(outputs, prompt, reply.tokens, reply.choice["lazy_layers"], full_rows)
        outputs.assert_equal()


@pytest.mark.served_by(DYNAMIC_LIST)
def test_a_given_list_is_cut_behind_the_prompt(server: Server) -> None:
    """Whole and staged prompts, with full attention in prefill; a repeat inherits; short ones have it too."""
    lazy = DYNAMIC_SERVERS[DYNAMIC_LIST]
    # The score plays no part: nothing here asks the reference for a choice.
    reference = DynamicReference(
        lazy.model(), lazy.keep, lazy.sinks, lazy.recent, "lighttransfer", lazy.default
    )
    rng = random.Random(9)
    window = lazy.sinks + lazy.recent
    lengths = (3, window, window + 1, 200, CHUNK, CHUNK + 1, 2 * CHUNK + 30, 900, 1700, LONGEST_PROMPT)
    asked = [random_prompt(length, rng) for length in lengths]
    server.flush_cache()
    replies = server.generate_all(asked, NEW_TOKENS, ask=True)
    outputs = Comparison(0, 0, [])
    for prompt, reply in zip(asked, replies, strict=True):
        long = len(prompt) > window
        assert reply.cached == 0 and reply.choice is not None
        assert reply.choice["lazy_layers"] == list(lazy.default)
        assert reply.choice["origin"] == ("prompt" if long else "default")
        listed = [float(layer in lazy.default) for layer in range(reference.num_layers)]
        assert reply.choice["laziness"] == (listed if long else None)
        reference.compare_output(outputs, prompt, reply.tokens, lazy.default, len(prompt) if long else 0)
    outputs.assert_equal()
    # Windows in prefill, as of a static list, would have gone on otherwise; so would no windows at all.
    for layers, full_rows in ((lazy.default, 0), ((), lengths[-1])):
        control = Comparison(0, 0, [])
        reference.compare_output(control, asked[-1], replies[-1].tokens, layers, full_rows)
        control.assert_differs()
    again = server.generate(asked[-1], 1, ask=True)
    assert again.choice == {**replies[-1].choice, "origin": "prefix"} and again.cached == lengths[-1] - 1
    _share_documents(server, reference, rng)
    info = server.lighttransfer()
    assert info["score"] == "list" and info["mode"] == "dynamic" and info["lazy_layers"] == "0,3,5"
