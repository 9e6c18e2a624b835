"""Dynamic mode with cached prefixes: whose layers a request has, and that its outputs follow from them.

A cached prefix is K and V of its writer's layers. So of a request that inherits them, the queries below the
hit saw what the writer's did (everything, while they belonged to its prompt), the others stream. A hit ends a
token before the prompt does; but a request whose prompt is all cached goes on with the writer's last row in
place of its own.

As in SGLang's own sliding-window cache, only the windows at the ends of prompts and outputs stay, so hits end
there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from .dynamic_reference import LAST_QUERIES, SCORE_TOLERANCE, Choices, DynamicReference
from .prompts import random_prompt
from .reference import Comparison
from .server import Reply, Server
from .specs import DYNAMIC, DYNAMIC_SERVERS
from .test_dynamic import make_reference

pytestmark = [pytest.mark.engine, pytest.mark.served_by(DYNAMIC)]

LAZY = DYNAMIC_SERVERS[DYNAMIC]
BLOCK = LAZY.sinks + LAZY.recent
NEW_TOKENS = 24

Prompt = Sequence[int]


@pytest.fixture(scope="module")
def reference() -> DynamicReference:
    """Made once."""
    return make_reference(DYNAMIC)


class Asker:
    """Sends prompts and checks each reply: by its own decision, the default, or as an heir."""

    def __init__(self, server: Server, reference: DynamicReference) -> None:
        self.server = server
        self.reference = reference

    def decided(self, prompt: Prompt, **body: Any) -> Reply:
        """A request that finds nothing in the cache and is decided by its own prompt."""
        return self.check_decided(prompt, self.server.generate(prompt, NEW_TOKENS, ask=True, **body))

    def check_decided(self, prompt: Prompt, reply: Reply) -> Reply:
        """The same of a reply that is there."""
        assert reply.choice is not None
        assert (reply.choice["origin"], reply.cached) == ("prompt", 0)
        choices = Choices()
        self.reference.compare_choice(choices, prompt, reply.choice, len(prompt), LAST_QUERIES)
        choices.assert_equal()
        self._outputs(prompt, reply, len(prompt)).assert_equal()
        return reply

    def heir(self, prompt: Prompt, writer: Reply, written: Prompt, **body: Any) -> Reply:
        """A request that inherits the layers of ``writer``, whose prompt was ``written``."""
        reply = self.server.generate(prompt, NEW_TOKENS, ask=True, **body)
        return self.check_heir(prompt, reply, writer, written)

    def check_heir(self, prompt: Prompt, reply: Reply, writer: Reply, written: Prompt) -> Reply:
        """The same of a reply that is there."""
        assert reply.choice is not None and writer.choice is not None
        assert reply.choice == {**writer.choice, "origin": "prefix"}
        assert reply.cached >= BLOCK
        same = [a == b for a, b in zip(prompt, written, strict=False)]
        full = [*same, False].index(False)
        first, rest = (self._outputs(prompt, reply, rows) for rows in (min(reply.cached, full), full))
        wrong = [w for w in first.wrong if w[1] == 0] + [w for w in rest.wrong if w[1] > 0]
        Comparison(rest.tokens, rest.ties, wrong).assert_equal()
        return reply

    def default(self, prompt: Prompt) -> Reply:
        """A short prompt."""
        reply = self.server.generate(prompt, NEW_TOKENS, ask=True)
        expected = {"lazy_layers": list(LAZY.default), "laziness": None, "origin": "default"}
        assert reply.choice == expected
        self._outputs(prompt, reply, 0).assert_equal()
        return reply

    def _outputs(self, prompt: Prompt, reply: Reply, full_rows: int) -> Comparison:
        assert reply.choice is not None
        result = Comparison(0, 0, [])
        lazy = reply.choice["lazy_layers"]
        self.reference.compare_output(result, prompt, reply.tokens, lazy, full_rows)
        return result


@pytest.fixture
def ask(server: Server, reference: DynamicReference) -> Asker:
    """With an empty cache."""
    server.flush_cache()
    return Asker(server, reference)


def assert_same_choice(one: Reply, other: Reply) -> None:
    """Decided twice, of one prompt: the same layers, by scores that are equal up to rounding."""
    assert one.choice is not None and other.choice is not None
    assert one.choice["lazy_layers"] == other.choice["lazy_layers"]
    assert one.choice["laziness"] == pytest.approx(other.choice["laziness"], abs=SCORE_TOLERANCE)


def layer_sets(server: Server) -> dict[str, int]:
    """The store's numbers."""
    return server.lighttransfer()["layer_sets"]


def test_prompts_that_share_their_first_block_share_their_layers(ask: Asker) -> None:
    """The same prompt, and longer ones; the last of each would clearly have chosen otherwise by itself."""
    rng = random.Random(1)
    for length in (65, 120, 300, 700):
        trunk = random_prompt(length, rng)
        writer = ask.decided(trunk)
        again = ask.heir(trunk, writer, trunk)
        assert again.cached == length - 1
        for more in (1, 31, 80, 400):
            prompt = [*trunk, *random_prompt(more, rng)]
            assert ask.heir(prompt, writer, trunk).cached == length
        prompt = ask.reference.clear_prompt(
            lambda trunk=trunk: [*trunk, *random_prompt(100, rng)], unlike=writer.choice["lazy_layers"]
        )
        assert ask.heir(prompt, writer, trunk).cached == length


def test_a_conversation_keeps_its_layers(ask: Asker) -> None:
    """What was generated streamed, and is read as such."""
    rng = random.Random(2)
    prompt = random_prompt(200, rng)
    writer = ask.decided(prompt)
    history = [*prompt, *writer.tokens]
    for _ in range(3):
        history += random_prompt(rng.randint(1, 60), rng)
        before = len(history)
        reply = ask.heir(history, writer, prompt)
        assert reply.cached > len(prompt)
        history += reply.tokens
        assert len(history) == before + NEW_TOKENS


def test_a_hit_shorter_than_the_first_block_is_a_miss(ask: Asker) -> None:
    """However much is cached of it."""
    rng = random.Random(3)
    trunk = random_prompt(300, rng)
    ask.decided(trunk)
    for fork in (1, 40, BLOCK - 1):
        other = [*trunk[:fork], trunk[fork] ^ 1 or 5, *trunk[fork + 1 :]]
        writer = ask.decided(other)
        ask.heir(other, writer, other)


def test_extra_keys_share_nothing(ask: Asker) -> None:
    """Tenants and adapters have layers of their own."""
    prompt = random_prompt(200, random.Random(4))
    one = ask.decided(prompt)
    two = ask.decided(prompt, extra_key="tenant")
    ask.heir(prompt, two, prompt, extra_key="tenant")
    ask.heir(prompt, one, prompt)


def test_short_prompts_share_under_the_default(ask: Asker) -> None:
    """Up to sink + recent tokens; one more token is a prompt of its own."""
    rng = random.Random(5)
    short = random_prompt(BLOCK, rng)
    assert ask.default(short).cached == 0
    assert ask.default(short).cached == BLOCK - 1
    shorter = random_prompt(BLOCK - NEW_TOKENS - 10, rng)
    assert ask.default(shorter).cached == 0
    assert ask.default([*shorter[:20], *random_prompt(10, rng)]).cached == 20
    assert ask.default(shorter[:15]).cached == 14
    longer = [*short, 7]
    writer = ask.decided(longer)
    assert ask.heir(longer, writer, longer).cached == BLOCK
    assert ask.default(short).cached == BLOCK - 1


def test_at_the_same_time(ask: Asker, server: Server) -> None:
    """Those that are decided side by side keep their own choices, and each finds its own again."""
    rng = random.Random(6)
    before = layer_sets(server)
    trunk = random_prompt(100, rng)
    prompts = [[*trunk, *random_prompt(20, rng)] for _ in range(6)]
    parameters = {
        "temperature": 0,
        "max_new_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "custom_params": {"lighttransfer": True},
    }
    answers = server.post("/generate", {"input_ids": prompts, "sampling_params": parameters}).json()
    replies = []
    for answer in answers:
        meta = answer["meta_info"]
        (choice,) = meta["lighttransfer"]
        replies.append(Reply(answer["output_ids"], meta["cached_tokens"], "length", choice))
    deciders = [i for i, reply in enumerate(replies) if reply.choice["origin"] == "prompt"]
    after = layer_sets(server)
    assert after["decided"] - before["decided"] == after["stored"] == len(deciders) >= 2
    for i in deciders:
        ask.check_decided(prompts[i], replies[i])
    for i in deciders:
        history = [*prompts[i], *replies[i].tokens, 9, 9, 9]
        assert ask.heir(history, replies[i], prompts[i]).cached > len(prompts[i])


@pytest.mark.parametrize("given", [[1], "lighttransfer", {"lighttransfer": 0}], ids=str)
def test_what_clients_send_as_custom_params_ends_no_server(given: object, server: Server) -> None:
    parameters = {"temperature": 0, "max_new_tokens": 2, "custom_params": given}
    prompt = random_prompt(120, random.Random(11))
    answer = server.post("/generate", {"input_ids": prompt, "sampling_params": parameters})
    if isinstance(given, dict):
        assert answer.status_code == 200 and "lighttransfer" not in answer.json()["meta_info"]
    else:
        assert answer.status_code == 400 and "custom_params" in answer.text
    server.assert_healthy()


def test_users_of_one_system_prompt_keep_their_conversations(ask: Asker) -> None:
    """Each was decided by itself; whoever comes between, the next turn finds its own K, V and layers."""
    rng = random.Random(10)
    system = random_prompt(150, rng)
    prompts = [[*system, *random_prompt(length, rng)] for length in (200, 200, 230, 260)]
    writers = [ask.decided(prompt) for prompt in prompts]
    assert len({tuple(writer.choice["laziness"]) for writer in writers}) == len(writers)
    histories = [[*prompt, *writer.tokens] for prompt, writer in zip(prompts, writers, strict=True)]
    for turn in (1, 2):
        for user in rng.sample(range(len(prompts)), len(prompts)):
            history = histories[user]
            known = len(history) - NEW_TOKENS
            history += random_prompt(10 * turn, rng)
            reply = ask.heir(history, writers[user], prompts[user])
            assert reply.cached >= known, "what it was asked and told before"
            history += reply.tokens


def test_evicted_and_back(ask: Asker, server: Server) -> None:
    """What left the cache is decided again, by whoever comes first, and shared again."""
    rng = random.Random(7)
    trunk = ask.reference.clear_prompt(lambda: random_prompt(400, rng))
    one, two = ([*trunk, *random_prompt(150, rng)] for _ in range(2))
    first = ask.decided(trunk)
    ask.heir(one, first, trunk)
    for _ in range(4):
        ask.decided(random_prompt(2000, rng))
    back = ask.decided(two)
    assert back.choice["laziness"] != first.choice["laziness"]
    ask.heir([*two, *back.tokens, 5], back, two)
    again = ask.decided(trunk)
    assert_same_choice(again, first)
    ask.heir(one, again, trunk)
    assert layer_sets(server)["requests"] == 0


def test_more_beginnings_than_sink_sets(ask: Asker, server: Server) -> None:
    """Whose sinks were given to another, is decided again."""
    rng = random.Random(8)
    sets = server.lighttransfer()["memory"]["sink_sets"]
    prompts = [random_prompt(80, rng) for _ in range(sets + 4)]
    for prompt in prompts:
        ask.decided(prompt)
    evicted = server.lighttransfer()["sinks"]["evicted"]
    assert evicted >= 4
    newest = ask.decided(random_prompt(80, rng))
    assert newest.choice is not None
    oldest = ask.decided(prompts[0])
    ask.heir(prompts[0], oldest, prompts[0])


def test_flush(ask: Asker, server: Server) -> None:
    """Afterwards nothing is shared."""
    rng = random.Random(9)
    prompt = ask.reference.clear_prompt(lambda: random_prompt(150, rng))
    writer = ask.decided(prompt)
    ask.heir(prompt, writer, prompt)
    assert layer_sets(server)["stored"] >= 1
    server.flush_cache()
    assert layer_sets(server)["stored"] == 0
    again = ask.decided(prompt)
    assert_same_choice(again, writer)
