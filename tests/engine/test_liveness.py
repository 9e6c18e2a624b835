"""Nothing a client sends parks the scheduler, and what fits the memory is answered.

Every request here has a time within which it, and one beside it, must be answered: a scheduler that is parked
answers nobody until a client hangs up.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lt_sglang.hooks.queue_watch import STUCK_SECONDS

from .environment import server_environment, write_plugin
from .prompts import random_prompt
from .reference import Reference
from .server import Server, running
from .server_flags import TIGHT_POOL
from .specs import DYNAMIC, DYNAMIC_SERVERS, LAZY_SERVERS, REUSE, TIGHT

pytestmark = pytest.mark.engine

PLACEHOLDER = 3
SECONDS = 150.0
# Its scheduler parks the request as soon as the memory is full.
NO_SLIDING = """
def register():
    from lt_sglang.cache.radix_static import LightTransferRadixCache

    LightTransferRadixCache.slide_window = lambda self, req: None
"""


def score(server: Server, length: int, rng: random.Random) -> Any:
    """A prompt whose first token is an embedding of the client's: SGLang bars it from the tree."""
    tokens = [PLACEHOLDER, *random_prompt(length - 1, rng)]
    tokens = [
        PLACEHOLDER if index == 0 else max(token, PLACEHOLDER + 1) for index, token in enumerate(tokens)
    ]
    body = {
        "query": tokens[:-1],
        "items": [tokens[-1:]],
        "label_token_ids": [10, 11],
        "embed_override_token_id": PLACEHOLDER,
        "query_embed_overrides": [[rng.gauss(0.0, 0.2) for _ in range(64)]],
    }
    return server.post("/v1/score", body)


def in_time(work: Callable[[], Any]) -> Any:
    """What ``work`` returns; it must not take long."""
    began = time.monotonic()
    result = work()
    assert time.monotonic() - began < SECONDS
    return result


def longer_than_all_layers_hold(server: Server) -> int:
    """Tokens of a prompt that fills the memory unless its window slides."""
    memory = server.lighttransfer()["memory"]
    length = server.room() + 100
    assert length < min(memory["longest_request"], memory["demand"]["context"] - 10), memory
    return length


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(REUSE, marks=pytest.mark.served_by(REUSE)),
        pytest.param(DYNAMIC, marks=pytest.mark.served_by(DYNAMIC)),
    ],
)
def test_a_long_prompt_that_is_barred_from_the_tree(server: Server, name: str) -> None:
    """Alone, and with others beside it."""
    rng = random.Random(31)
    length = longer_than_all_layers_hold(server)
    for _ in range(2):
        with ThreadPoolExecutor(2) as pool:
            barred = pool.submit(score, server, length, rng)
            beside = pool.submit(server.generate, random_prompt(40, rng), 8)
            answer = in_time(barred.result)
            assert answer.status_code == 200, answer.text
            assert len(in_time(beside.result).tokens) == 8
    server.flush_cache()  # refused unless the server is idle


@pytest.mark.served_by(TIGHT)
def test_a_request_that_fits_the_memory_is_answered(server: Server) -> None:
    """Memory for one request: alone it fills it, with a long prompt or a long output."""
    lazy = LAZY_SERVERS[TIGHT]
    reference = Reference(lazy.model(), lazy.layers, lazy.sinks, lazy.recent)
    rng = random.Random(33)
    longest = server.lighttransfer()["memory"]["longest_request"]
    assert server.room() < longest <= TIGHT_POOL
    for new_tokens in (longest - 301, 20):
        prompt_tokens = longest - 1 - new_tokens
        server.flush_cache()
        prompt = random_prompt(prompt_tokens, rng)
        reply = in_time(lambda prompt=prompt, new=new_tokens: server.generate(prompt, new))
        assert len(reply.tokens) == new_tokens and reply.finish == "length"
        reference.compare([prompt], [reply.tokens]).assert_equal()
    # A second turn holds its cached prefix, too, whose last nodes are locked whole.
    server.flush_cache()
    history = random_prompt(100, rng)
    for new_tokens in (59, 130, longest - 400):
        reply = in_time(lambda prompt=list(history), new=new_tokens: server.generate(prompt, new))
        assert len(reply.tokens) == new_tokens
        history = [*history, *reply.tokens, *random_prompt(30, rng)]


@pytest.mark.served_by(TIGHT)
def test_a_request_that_never_fits_is_refused_with_the_numbers(server: Server) -> None:
    rng = random.Random(34)
    longest = server.lighttransfer()["memory"]["longest_request"]
    body = {"input_ids": random_prompt(longest + 1, rng), "sampling_params": {"max_new_tokens": 4}}
    answer = in_time(lambda: server.post("/generate", body))
    assert answer.status_code == 400
    assert f"{longest + 1} tokens" in answer.text and "maximum allowed length" in answer.text
    assert len(in_time(lambda: server.generate(random_prompt(40, rng), 4)).tokens) == 4


@pytest.mark.served_by(TIGHT)
def test_many_that_each_fill_the_memory_take_turns(server: Server) -> None:
    rng = random.Random(35)
    prompts = [random_prompt(rng.randrange(100, 400), rng) for _ in range(6)]
    replies = in_time(lambda: server.generate_all(prompts, 100))
    assert [len(reply.tokens) for reply in replies] == [100] * len(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_queue_that_can_never_move_is_ended(mode: str, tmp_path: Path) -> None:
    """The fault the windows had, made on purpose: the prompt is ended with 503, the others are answered."""
    (tmp_path / "no_sliding.py").write_text(NO_SLIDING)
    write_plugin(tmp_path, "no_sliding", "no_sliding:register")
    spec = LAZY_SERVERS[REUSE].spec if mode == "static" else DYNAMIC_SERVERS[DYNAMIC].spec
    path = server_environment()["PYTHONPATH"]
    spec = replace(spec, name=f"stuck-{mode}", env={**spec.env, "PYTHONPATH": f"{tmp_path}:{path}"})
    rng = random.Random(36)
    with running(spec, tmp_path) as server, ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        barred = pool.submit(score, server, longer_than_all_layers_hold(server), rng)
        time.sleep(2.0)
        beside = pool.submit(server.generate, random_prompt(40, rng), 8)
        answer = barred.result()
        assert answer.status_code == 503, answer.text
        assert "cannot start or go on" in answer.text and "of KV memory free" in answer.text
        assert len(beside.result().tokens) == 8
        assert time.monotonic() - began < STUCK_SECONDS + 30
        assert "is ended with 503" in server.log_text()
        server.flush_cache()
