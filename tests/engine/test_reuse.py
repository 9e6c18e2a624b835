"""Slots, cached prefixes and sink sets go round and round, and outputs stay right.

A window of 4 + 16 tokens makes everything happen often: a request leaves its window after 20 tokens, and
there are fewer sink sets than windows, so that sets are refused and evicted.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from . import storm
from .prompts import random_prompt
from .reference import Reference
from .server import Reply, Server
from .specs import LAZY_SERVERS, NO_RADIX, REUSE

pytestmark = pytest.mark.engine
reuse = pytest.mark.served_by(REUSE)


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    """One reference a server, made once."""
    servers = [LAZY_SERVERS[name] for name in (REUSE, NO_RADIX)]
    return {lazy.name: Reference(lazy.model(), lazy.layers, lazy.sinks, lazy.recent) for lazy in servers}


@pytest.fixture
def ask(server: Server, references: dict[str, Reference]):
    """Send prompts at once, check every output against the reference, return the replies."""

    def send(
        prompts: Sequence[Sequence[int]], new_tokens: int = 32, *, together: bool = False
    ) -> list[Reply]:
        if together:
            replies = server.generate_together(prompts, new_tokens)
        else:
            replies = server.generate_all(prompts, new_tokens, clients=32)
        outputs = [reply.tokens for reply in replies]
        references[server.spec.name].compare(prompts, outputs).assert_equal()
        return replies

    return send


@reuse
def test_the_same_prompts_again_hit_the_cache(server: Server, ask, references: dict[str, Reference]) -> None:
    """Equal outputs, and all but the newest tokens come from the cache; after a flush, none do."""
    rng = random.Random(1)
    prompts = [random_prompt(length, rng) for length in (10, 19, 20, 21, 64, 300, 900)]
    server.flush_cache()
    first = ask(prompts)
    again = ask(prompts)
    assert [reply.cached for reply in first] == [0] * len(prompts)
    # A prompt whose window was reclaimed while others ran is computed again.
    assert sum(reply.cached for reply in again) >= sum(map(len, prompts)) // 2, again
    references[REUSE].assert_same(prompts, [reply.tokens for reply in first], [r.tokens for r in again])
    server.flush_cache()
    assert [reply.cached for reply in ask(prompts)] == [0] * len(prompts)


@reuse
def test_prefixes_grow_and_diverge(ask) -> None:
    """A cached prompt goes on with its own output, as in a conversation, and in two directions at once."""
    rng = random.Random(2)
    history = random_prompt(500, rng)
    for turn in range(4):
        (reply,) = ask([history])
        if turn:
            assert reply.cached > 400, (turn, reply.cached)
        history = [*history, *reply.tokens, *random_prompt(40, rng)]
    trunk = history[:300]
    forks = [[*trunk, *random_prompt(length, rng)] for length in (1, 15, 16, 17, 100, 400)]
    ask([trunk])
    assert all(reply.cached > 0 for reply in ask(forks))
    ask(forks[::-1])


@reuse
def test_a_long_output_holds_one_window(server: Server, ask) -> None:
    """The prompt's window is free to be evicted once the output has left it; stock keeps it to the end."""
    server.flush_cache()
    before = len(server.log_text())
    ask([random_prompt(120, random.Random(6))], new_tokens=200)
    lines = re.findall(r"Decode batch.*#swa token: (\d+)", server.log_text()[before:])
    assert len(lines) > 2, "decode is logged every 40 tokens"
    assert int(lines[-1]) <= LAZY_SERVERS[REUSE].recent + 4, lines


@reuse
def test_more_beginnings_than_sink_sets(server: Server, ask) -> None:
    """Sets are evicted; a hit whose sinks are gone becomes a miss, and no output changes."""
    rng = random.Random(3)
    server.flush_cache()
    sets = server.lighttransfer()["memory"]["sink_sets"]
    prompts = [random_prompt(24, rng) for _ in range(sets + 8)]
    before = server.lighttransfer()["sinks"]["evicted"]
    for start in range(0, len(prompts), 4):
        ask(prompts[start : start + 4], new_tokens=2)
    assert server.lighttransfer()["sinks"]["evicted"] > before
    newest = ask(prompts[-1:], new_tokens=2)
    oldest = ask(prompts[:1], new_tokens=2)
    assert newest[0].cached > 16 and oldest[0].cached == 0
    ask(prompts, new_tokens=2)


@reuse
def test_every_running_request_finds_a_sink_set(server: Server, ask) -> None:
    """Sets are taken from the same memory as all slots, so none is refused while there is any.

    Some are cached whole before they need their sinks, some are not. One that is refused all the same:
    tests/unit/test_radix.py, tests/property.
    """
    rng = random.Random(4)
    server.flush_cache()
    before = server.lighttransfer()["sinks"]["refused"]
    lengths = [rng.randint(20, 24) for _ in range(28)] + [5, 10, 15, 24]
    ask([random_prompt(length, rng) for length in lengths], new_tokens=64, together=True)
    assert server.lighttransfer()["sinks"]["refused"] == before


@reuse
def test_nobody_is_retracted_whose_output_is_named(server: Server, ask) -> None:
    """More than fit, and none may end early (ignore_eos): admission knows how long they get."""
    rng = random.Random(5)
    prompts = [random_prompt(rng.randint(1, 200), rng) for _ in range(20)]
    marker = "KV cache pool is full. Retract requests."
    before = server.log_text().count(marker)
    ask(prompts, new_tokens=400, together=True)
    assert server.log_text().count(marker) == before, "requests were retracted"


@reuse
def test_aborts(server: Server, ask) -> None:
    """Requests end while queued, between prefill chunks and in decode; the rest is untouched."""
    rng = random.Random(6)
    doomed = [random_prompt(rng.randint(1, 3000), rng) for _ in range(12)]
    kept = [random_prompt(rng.randint(1, 600), rng) for _ in range(12)]
    with ThreadPoolExecutor(len(doomed)) as pool:
        ends = [
            pool.submit(server.generate, prompt, 500, rid=f"doomed-{number}")
            for number, prompt in enumerate(doomed)
        ]
        with ThreadPoolExecutor(1) as rest:
            finished = rest.submit(ask, kept)
            for number in rng.sample(range(len(doomed)), len(doomed)):
                time.sleep(rng.uniform(0, 0.3))
                server.abort(f"doomed-{number}")
            finished.result()
        server.abort(everything=True)
        assert {end.result().finish for end in ends} == {"abort"}


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=pytest.mark.served_by(name), id=f"{name}-{seed}")
        for name, seed in ((REUSE, 0), (REUSE, 1), (NO_RADIX, 2))
    ],
)
def test_mixed_traffic(name: str, seed: int, server: Server, references: dict[str, Reference]) -> None:
    """Everything at once; what every request got, dropped ones included, equals the reference."""
    jobs = storm.storm(count=80, longest=1500, longest_output=200, seed=seed)
    outputs = storm.run(server, jobs)
    whole = [len(out) == job.new_tokens for job, out in zip(jobs, outputs, strict=True)]
    assert all(done or job.abort or job.drop_after is not None for done, job in zip(whole, jobs, strict=True))
    started = [(job.prompt, output) for job, output in zip(jobs, outputs, strict=True) if output]
    references[name].compare(*zip(*started, strict=True)).assert_equal()
    storm.assert_all_returned(server)
