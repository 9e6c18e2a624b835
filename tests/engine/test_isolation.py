"""No request reads another's K and V: across weight updates, embed overrides, tenants; no log tells of them.

With the prefix cache on, SGLang keeps old prefixes where a weight update does not flush it, and so do we.
Without it, every answer is what its own weights give.
"""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from .prompts import random_prompt
from .server import Reply, Server, events
from .specs import DYNAMIC_RETRACT, LAZY_SERVERS, NO_RADIX, RADIX, REUSE, SMOLLM2

pytestmark = pytest.mark.engine

NEW_TOKENS = 48


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of NO_RADIX with the token embeddings of other tokens."""
    stock = LAZY_SERVERS[NO_RADIX].model()
    other = tmp_path_factory.mktemp("other-weights") / "model"
    shutil.copytree(stock, other)
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return other


def update(server: Server, path: Path, **body: Any) -> None:
    answer = server.post("/update_weights_from_disk", {"model_path": str(path), "flush_cache": False, **body})
    assert answer.status_code == 200 and answer.json()["success"], answer.text


@pytest.mark.served_by(NO_RADIX)
def test_no_sink_outlives_its_weights_without_a_prefix_cache(server: Server, other_weights: Path) -> None:
    """Idle updates, there and back: each answer is that of a server which never had other weights."""
    rng = random.Random(41)
    prompts = [random_prompt(length, rng) for length in (60, 200, 600)]
    old = [reply.tokens for reply in server.generate_all(prompts, NEW_TOKENS)]
    assert server.lighttransfer()["memory"]["sink_sets_used"] == 0, "nobody uses them, nobody keeps them"
    try:
        update(server, other_weights)
        new = [reply.tokens for reply in server.generate_all(prompts, NEW_TOKENS)]
        again = [reply.tokens for reply in server.generate_all(prompts, NEW_TOKENS)]
    finally:
        update(server, LAZY_SERVERS[NO_RADIX].model())
    assert new == again and all(a != b for a, b in zip(old, new, strict=True))
    assert [reply.tokens for reply in server.generate_all(prompts, NEW_TOKENS)] == old


@pytest.mark.served_by(NO_RADIX)
def test_who_was_paused_for_an_update_gives_no_sinks_to_who_came_after(
    server: Server, other_weights: Path
) -> None:
    """A pause in place: who runs goes on with K and V of both; who begins after it has nothing of the old."""
    rng = random.Random(42)
    prompt = random_prompt(400, rng)
    alike = [*prompt[:8], *random_prompt(200, rng)]
    try:
        update(server, other_weights)
        clean = server.generate(alike, NEW_TOKENS).tokens
        update(server, LAZY_SERVERS[NO_RADIX].model())
        with ThreadPoolExecutor(1) as pool:
            running = server.stream(prompt, 600)
            assert len(next(running)) > 0
            server.post("/pause_generation", {"mode": "in_place"}).raise_for_status()
            update(server, other_weights)
            after = pool.submit(server.generate, alike, NEW_TOKENS)
            server.post("/continue_generation", {}).raise_for_status()
            assert after.result().tokens == clean
            running.close()
    finally:
        server.abort(everything=True)
        update(server, LAZY_SERVERS[NO_RADIX].model())


@pytest.mark.served_by(NO_RADIX)
def test_embed_overrides_leave_nothing_behind(server: Server) -> None:
    """/v1/score with vectors in place of tokens, before and beside a plain request with the same tokens."""
    rng = random.Random(43)
    prompt = random_prompt(300, rng)
    prompt[0] = prompt[1] = 500
    prompt = [token if number < 2 or token != 500 else 501 for number, token in enumerate(prompt)]
    clean = server.generate(prompt, NEW_TOKENS).tokens
    score = {
        "model": "default",
        "query": prompt,
        "items": [[7, 8]],
        "label_token_ids": [5, 6],
        "embed_override_token_id": 500,
        "query_embed_overrides": [[3.0] * 64, [-3.0] * 64],
    }
    with ThreadPoolExecutor(8) as pool:
        scores = [pool.submit(server.post, "/v1/score", score) for _ in range(3)]
        plain = [pool.submit(server.generate, prompt, NEW_TOKENS) for _ in range(3)]
        assert [reply.result().tokens for reply in plain] == [clean] * 3
        assert {answer.result().status_code for answer in scores} == {200}
    assert server.generate(prompt, NEW_TOKENS).tokens == clean


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.served_by(name), id=name)
        for name in (RADIX, REUSE, NO_RADIX, DYNAMIC_RETRACT)
    ],
)
def test_tenants_share_nothing_and_answer_alike(name: str, server: Server) -> None:
    """Two tenants send the same prompts under maximal reuse; what one has cached is no hit for the other.

    The canary is the cache: a tenant's first request finds nothing, whatever the other has written, and its
    repeats find its own. Answers are equal, for the prompts are.
    """
    rng = random.Random(44)
    server.flush_cache()
    trunk = random_prompt(200, rng)
    prompts = [[*trunk, *random_prompt(40, rng)] for _ in range(3)]
    tenants: list[dict[str, Any]] = [
        {},
        {"extra_key": "tenant-a"},
        {"extra_key": "tenant-b"},
        {"cache_salt": "tenant-a"},
        {"extra_key": "tenant-b", "cache_salt": "tenant-a"},
    ]

    def ask(names: dict[str, Any], prompt: list[int]) -> Reply:
        return server.generate(prompt, 8, ask=True, **names)

    firsts = [ask(names, prompts[0]) for names in tenants]
    assert [reply.cached for reply in firsts] == [0] * len(tenants)
    assert len({tuple(reply.tokens) for reply in firsts}) == 1
    if name == DYNAMIC_RETRACT:
        assert {reply.choice["origin"] for reply in firsts if reply.choice} == {"prompt"}
    with ThreadPoolExecutor(len(tenants)) as pool:
        for prompt in prompts:
            replies = list(pool.map(lambda names, p=prompt: ask(names, p), tenants))
            assert len({tuple(reply.tokens) for reply in replies}) <= 1 + (name == DYNAMIC_RETRACT), name
    server.flush_cache()


@pytest.mark.served_by(RADIX)
def test_static_answers_say_so(server: Server) -> None:
    """The layers are the same for all; who asks is told, on every route."""
    expected = {"lazy_layers": list(LAZY_SERVERS[RADIX].layers), "laziness": None, "origin": "static"}
    prompt = random_prompt(80, random.Random(45))
    for new_tokens in (0, 4):
        assert server.generate(prompt, new_tokens, ask=True).choice == expected
    assert server.generate(prompt, 4).choice is None
    body = {"model": "default", "prompt": prompt, "max_tokens": 4, "custom_params": {"lighttransfer": True}}
    answer = server.post("/v1/completions", {**body, "n": 2}).json()
    assert answer["metadata"]["lighttransfer"] == [expected] * 2


@pytest.mark.served_by(SMOLLM2)
def test_chats_say_so_too(server: Server) -> None:
    """One entry a choice; in a stream, an event before its end."""
    expected = {"lazy_layers": list(LAZY_SERVERS[SMOLLM2].layers), "laziness": None, "origin": "static"}
    chat = {"model": "default", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
    asks = {**chat, "custom_params": {"lighttransfer": True}}
    answer = server.post("/v1/chat/completions", {**asks, "n": 2}).json()
    assert answer["metadata"]["lighttransfer"] == [expected] * 2
    with server.post("/v1/chat/completions", {**asks, "stream": True}, stream=True) as stream:
        *chunks, last = events(stream)
    assert last["metadata"]["lighttransfer"] == [expected] and last["choices"] == []
    assert not any(chunk.get("metadata") for chunk in chunks)
    unasked = server.post("/v1/chat/completions", chat).json()
    assert "lighttransfer" not in (unasked.get("metadata") or {})


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.served_by(n), id=n) for n in (RADIX, NO_RADIX, DYNAMIC_RETRACT)],
)
def test_logs_tell_no_secrets(name: str, server: Server) -> None:
    """Neither prompts nor what keeps tenants apart."""
    names = {"extra_key": "sesame-extra-key", "cache_salt": "sesame-cache-salt"}
    body = {"text": "sesame-of-a-prompt " * 8, "sampling_params": {"max_new_tokens": 4}, **names}
    assert server.post("/generate", body).status_code == 200
    assert server.post("/generate", {**body, "sampling_params": {"max_new_tokens": -1}}).status_code == 400
    assert "sesame" not in server.log_text()
