"""SGLang's HiCache under lazy layers: prefixes that were evicted come back from host memory as they were.

On a CPU host memory is plain memory, and copies are done where they are asked for. On a GPU, where it is
pinned and copied on streams of its own: tests/gpu/test_hicache.py. Under churn: test_churn.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from .dynamic_reference import DynamicReference
from .prompts import random_prompt
from .reference import TIE_MARGIN, Reference
from .server import Reply, Server, ServerFailed, running
from .specs import DYNAMIC_HOST, DYNAMIC_HOST_TP, DYNAMIC_SERVERS, HOST, HOST_TP, LAZY_SERVERS

pytestmark = pytest.mark.engine
on_host = pytest.mark.served_by(HOST)
LENGTHS = (300, 500, 700, 900, 400, 800, 600, 1000, 350, 450)
NEW_TOKENS = 16

Ask = Callable[[Sequence[Sequence[int]]], list[Reply]]


def on_one_rank_and_two(one: str, two: str) -> pytest.MarkDecorator:
    """The test runs on server ``one``, and on server ``two`` where slow tests run."""
    served_by, slow = pytest.mark.served_by, pytest.mark.slow
    first, second = pytest.param(1, marks=served_by(one)), pytest.param(2, marks=(served_by(two), slow))
    return pytest.mark.parametrize("ranks", [first, second], ids=["tp1", "tp2"])


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    """One a server, made once."""
    servers = [LAZY_SERVERS[name] for name in (HOST, HOST_TP)]
    return {lazy.name: Reference(lazy.model(), lazy.layers, lazy.sinks, lazy.recent) for lazy in servers}


@pytest.fixture
def ask(server: Server, references: dict[str, Reference]) -> Ask:
    """Send prompts one after the other, so that each drives out those before; checks every output."""

    def send(prompts: Sequence[Sequence[int]]) -> list[Reply]:
        replies = [server.generate(prompt, NEW_TOKENS) for prompt in prompts]
        outputs = [reply.tokens for reply in replies]
        references[server.spec.name].compare(prompts, outputs).assert_equal()
        return replies

    return send


def more_than_fits(server: Server, rng: random.Random) -> list[list[int]]:
    """Prompts that the device cannot cache all of: each drives out some of those before it."""
    prompts = [random_prompt(length, rng) for length in LENGTHS]
    memory = server.lighttransfer()["memory"]
    shape = memory["demand"]["shape"]
    held = (
        memory["units"] * memory["demand"]["page_size"] * max(1, shape["lazy_layers"] // shape["full_layers"])
    )
    assert sum(LENGTHS) > held / 2
    return prompts


def host(server: Server) -> dict[str, int]:
    """What /server_info says of host memory."""
    return dict(server.lighttransfer()["host_memory"])


@on_one_rank_and_two(HOST, HOST_TP)
def test_evicted_prefixes_come_back(ranks: int, server: Server, ask: Ask) -> None:
    """Windows, sinks and full layers of all; after a flush nothing is left on either side."""
    assert server.spec.tp == ranks
    server.flush_cache()
    empty = host(server)
    prompts = more_than_fits(server, random.Random(1))
    page = server.lighttransfer()["memory"]["demand"]["page_size"]
    assert [reply.cached for reply in ask(prompts)] == [0] * len(prompts)
    restored = server.lighttransfer()["sinks"]["restored"]
    for _ in range(2):
        replies = ask(prompts)
        assert [reply.cached for reply in replies] == [(len(p) - 1) // page * page for p in prompts]
    assert server.lighttransfer()["sinks"]["restored"] > restored
    assert host(server)["full_slots_used"] >= sum(map(len, prompts)) // page * page - len(prompts) * page
    server.flush_cache()
    assert host(server) == empty
    assert empty["full_slots_used"] == empty["streaming_slots_used"] == empty["sink_sets_used"] == 0
    assert [reply.cached for reply in ask(prompts[:2])] == [0, 0]


@on_host
def test_a_conversation_goes_on_after_others_drove_it_out(server: Server, ask: Ask) -> None:
    """Its decoded tokens come back with its prompt."""
    rng = random.Random(2)
    history = random_prompt(400, rng)
    for turn in range(3):
        (reply,) = ask([history])
        if turn:
            assert reply.cached >= 400, (turn, reply.cached)
        history = [*history, *reply.tokens, *random_prompt(50, rng)]
        ask(more_than_fits(server, rng))


@on_host
def test_many_at_once(server: Server, references: dict[str, Reference]) -> None:
    """Loads of several requests in one batch, beside requests that compute."""
    rng = random.Random(3)
    prompts = more_than_fits(server, rng)
    for _ in range(3):
        rng.shuffle(prompts)
        mixed = [*prompts, *(random_prompt(200, rng) for _ in range(4))]
        replies = server.generate_all(mixed, NEW_TOKENS, clients=14)
        references[HOST].compare(mixed, [reply.tokens for reply in replies]).assert_equal()


@pytest.mark.slow
@pytest.mark.served_by(HOST_TP)
def test_two_ranks(server: Server, references: dict[str, Reference]) -> None:
    """They admit, evict and load alike: a pool that is full all the time, and prompts in chunks."""
    rng = random.Random(4)
    prompts = more_than_fits(server, rng)
    for _ in range(3):
        rng.shuffle(prompts)
        replies = server.generate_all(prompts, NEW_TOKENS, clients=8)
        references[HOST_TP].compare(prompts, [reply.tokens for reply in replies]).assert_equal()


@on_one_rank_and_two(DYNAMIC_HOST, DYNAMIC_HOST_TP)
def test_layers_come_back_with_their_prefix(ranks: int, server: Server) -> None:
    """A prompt that was driven out is read with the layers it was written with."""
    assert server.spec.tp == ranks
    lazy = DYNAMIC_SERVERS[server.spec.name]
    reference = DynamicReference(lazy.model(), lazy.keep, lazy.sinks, lazy.recent, lazy.score, lazy.default)
    server.flush_cache()
    prompts = more_than_fits(server, random.Random(5))
    first = [server.generate(prompt, NEW_TOKENS, ask=True) for prompt in prompts]
    again = [server.generate(prompt, NEW_TOKENS, ask=True) for prompt in prompts]
    for prompt, one, other in zip(prompts, first, again, strict=True):
        assert one.choice is not None and one.choice["origin"] == "prompt" and not one.cached
        assert other.choice is not None and other.choice["origin"] == "prefix"
        assert other.cached == len(prompt) - 1
        assert other.choice["lazy_layers"] == one.choice["lazy_layers"]
        lazy_layers = one.choice["lazy_layers"]
        assert max(reference.margins(prompt, one.tokens, lazy_layers, len(prompt))) < TIE_MARGIN
        # It computes its last token itself, with streaming attention, and the tree takes that row.
        assert max(reference.margins(prompt, other.tokens, lazy_layers, other.cached)) < TIE_MARGIN


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["write_back", "write_through_selective"])
def test_write_policies(policy: str, tmp_path: Path, references: dict[str, Reference]) -> None:
    """write_back copies as it evicts; write_through_selective what was hit before."""
    flags = ("--hicache-write-policy", policy, "--hicache-size", "1")
    spec = LAZY_SERVERS[HOST].spec
    with running(replace(spec, flags=(*spec.flags, *flags)), tmp_path) as server:
        prompts = more_than_fits(server, random.Random(6))
        for _ in range(3):
            for prompt in prompts:
                twice = [server.generate(prompt, NEW_TOKENS).tokens for _ in range(2)]
                references[HOST].compare([prompt, prompt], twice).assert_equal()
        last = [server.generate(prompt, NEW_TOKENS).cached for prompt in prompts]
        assert min(last) > 0, last


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--hicache-ratio", "0.001"), ("--hicache-size", "100000")], ids=["too little", "too much"]
)
def test_host_memory_that_cannot_be_had(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The server does not start, and one sentence says what to change."""
    spec = LAZY_SERVERS[HOST].spec
    with (
        pytest.raises(ServerFailed, match="--hicache-size, --hicache-ratio: "),
        running(replace(spec, flags=(*spec.flags, *flags)), tmp_path),
    ):
        pass
