"""The HTTP interface with lazy layers: text and ids, streamed or not, and what /server_info tells."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from transformers import AutoTokenizer

from .prompts import random_prompt
from .reference import Reference
from .server import Server, events
from .server_flags import CHUNK, FULL_POOL
from .specs import ALTERNATING, LAZY_SERVERS, RADIX

pytestmark = [pytest.mark.engine, pytest.mark.served_by(RADIX)]

NEW_TOKENS = 32
GREEDY = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
COMPLETION = {"model": "default", "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 4
LAZY = LAZY_SERVERS[RADIX]

Clear = Callable[[Callable[[], list[int]]], list[int]]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Made once."""
    return Reference(LAZY.model(), LAZY.layers, LAZY.sinks, LAZY.recent)


@pytest.fixture
def clear(server: Server, reference: Reference) -> Clear:
    """The first prompt whose answer no rounding changes: sent another way, it must be the same."""

    def find(make: Callable[[], list[int]]) -> list[int]:
        for _ in range(100):
            prompt = make()
            if reference.is_clear(prompt, server.generate(prompt, NEW_TOKENS).tokens):
                return prompt
        raise AssertionError("no such prompt in 100")

    return find


@pytest.fixture
def text(clear: Clear) -> tuple[str, list[int]]:
    """A text, and its ids."""
    tokenizer = AutoTokenizer.from_pretrained(LAZY.model())
    texts = (f"{TEXT}{number} " for number in range(100))
    ids = clear(lambda: list(tokenizer(next(texts))["input_ids"]))
    assert len(ids) > 2 * LAZY.recent
    return tokenizer.decode(ids), ids


def test_generate_takes_text_and_ids(server: Server, text: tuple[str, list[int]]) -> None:
    """The same prompt as text and as ids gives the same text and tokens."""
    words, ids = text
    by_text = server.post("/generate", {"text": words, "sampling_params": GREEDY}).json()
    by_ids = server.post("/generate", {"input_ids": ids, "sampling_params": GREEDY}).json()
    assert by_text["output_ids"] == by_ids["output_ids"] and len(by_ids["output_ids"]) == NEW_TOKENS
    assert by_text["text"] == by_ids["text"] != ""
    assert by_text["meta_info"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 700])
def test_streamed_equals_whole(server: Server, length: int, clear: Clear) -> None:
    """A stream ends with what one answer holds; a prompt of one token works."""
    rng = random.Random(length)
    prompt = clear(lambda: random_prompt(length, rng))
    streamed = list(server.stream(prompt, NEW_TOKENS))
    assert len(streamed) > 1, "the answer came in one piece"
    assert streamed[-1] == server.generate(prompt, NEW_TOKENS).tokens


def test_a_batch_in_one_request(server: Server, clear: Clear) -> None:
    """A list of prompts is answered in its order."""
    rng = random.Random(0)
    prompts = [clear(lambda length=length: random_prompt(length, rng)) for length in (3, 200, 1, 64)]
    answers = server.post("/generate", {"input_ids": prompts, "sampling_params": GREEDY}).json()
    assert [a["output_ids"] for a in answers] == [server.generate(p, NEW_TOKENS).tokens for p in prompts]


def test_completions(server: Server, text: tuple[str, list[int]]) -> None:
    """/v1/completions agrees with /generate, for text and for ids, with usage filled in."""
    words, ids = text
    expected = server.post("/generate", {"text": words, "sampling_params": GREEDY}).json()["text"]
    for prompt in (words, ids):
        answer = server.post("/v1/completions", {**COMPLETION, "prompt": prompt}).json()
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["usage"]["completion_tokens"] == NEW_TOKENS


def test_completions_streamed(server: Server, text: tuple[str, list[int]]) -> None:
    """The pieces of a stream make up the whole, and the usage comes last when asked for."""
    body = {**COMPLETION, "prompt": text[0]}
    whole = server.post("/v1/completions", body).json()["choices"][0]["text"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with server.post("/v1/completions", body, stream=True) as answer:
        pieces = list(events(answer))
    assert "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"]) == whole
    assert pieces[-1]["usage"]["completion_tokens"] == NEW_TOKENS


def test_server_info(server: Server) -> None:
    """/server_info shows what is served: mode, layers, windows, memory, sinks."""
    lazy = LAZY_SERVERS[RADIX]
    shown = server.lighttransfer()
    assert shown["mode"] == "static"
    assert shown["lazy_layers"] == ",".join(map(str, ALTERNATING)) and shown["num_lazy_layers"] == len(
        ALTERNATING
    )
    assert (shown["sink_tokens"], shown["recent_tokens"]) == (lazy.sinks, lazy.recent)
    assert shown["kv_bytes"] == lazy.spec.lazy["kv_bytes"]
    assert shown["attention_backend"] == "LightTransferTorchBackend"
    memory = shown["memory"]
    assert memory["full_limit"] == FULL_POOL and memory["units"] >= memory["units_free"] > 0
    assert 0.9 * shown["kv_bytes"] < memory["units"] * memory["unit_bytes"] <= shown["kv_bytes"]
    # Half the layers keep a window only, so it is much longer than what all layers would hold.
    assert 1.4 * server.room() < memory["longest_request"] <= FULL_POOL
    demand = memory["demand"]
    assert demand["shape"] == {"full_layers": 3, "lazy_layers": 3} and demand["page_size"] == 1
    assert (demand["window"], demand["chunk"], demand["undecided"]) == (lazy.recent, CHUNK, 0)
    assert memory["sink_sets"] >= 8
    assert memory["sink_sets"] >= memory["sink_sets_used"] >= memory["sink_sets_in_use"]
    assert set(shown["sinks"]) == {"captured", "shared", "evicted", "refused", "restored"}
    assert server.info()["attention_backend"] == "lighttransfer"
