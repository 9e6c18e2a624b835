"""Dynamic mode: the same prompt gets the same layers and tokens, alone, as one of n copies, and retracted.

Prompts are taken whose choice of layers does not hang on rounding: between the scores of the last layer that
stays full and the first that becomes lazy there is room, as the server itself reports them.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from .dynamic_reference import DynamicReference
from .models import EOS
from .prompts import random_prompt
from .reference import Comparison
from .server import Reply, Server, events
from .specs import DYNAMIC_RETRACT, DYNAMIC_SERVERS
from .test_dynamic import make_reference

pytestmark = [pytest.mark.engine, pytest.mark.served_by(DYNAMIC_RETRACT)]

LAZY = DYNAMIC_SERVERS[DYNAMIC_RETRACT]
BLOCK = LAZY.sinks + LAZY.recent
ROOM = 1e-3
ASK = {"lighttransfer": True}


@pytest.fixture(scope="module")
def reference() -> DynamicReference:
    """Made once."""
    return make_reference(DYNAMIC_RETRACT)


@pytest.fixture
def cold(server: Server) -> Server:
    """With an empty cache."""
    server.flush_cache()
    return server


def room(choice: dict[str, Any]) -> float:
    """Between the scores of the laziest full layer and of the least lazy one that became lazy."""
    scores = choice["laziness"]
    lazy = set(choice["lazy_layers"])
    return min(scores[i] for i in lazy) - max(s for i, s in enumerate(scores) if i not in lazy)


def alone(server: Server, length: int, new_tokens: int, rng: random.Random) -> tuple[list[int], Reply]:
    """A prompt with room between its layers, and its answer with nothing else running and nothing cached.

    It goes on to its limit by itself.
    """
    while True:
        prompt = random_prompt(length, rng)
        server.flush_cache()
        reply = server.generate(prompt, new_tokens, ask=True)
        assert reply.choice is not None and reply.cached == 0
        if EOS not in reply.tokens and (length <= BLOCK or room(reply.choice) > ROOM):
            return prompt, reply


def test_each_of_n_answers_as_one(cold: Server) -> None:
    """SGLang sends the prompt once ahead, then n copies, which would find all but their last row cached."""
    rng = random.Random(31)
    for length in (20, BLOCK + 1, 300):
        prompt, one = alone(cold, length, 24, rng)
        for order in ("n after one", "n on an empty cache"):
            parameters = {
                "temperature": 0,
                "max_new_tokens": 24,
                "ignore_eos": True,
                "custom_params": ASK,
                "n": 4,
            }
            answers = cold.post("/generate", {"input_ids": prompt, "sampling_params": parameters}).json()
            assert len(answers) == 4
            for answer in answers:
                (choice,) = answer["meta_info"]["lighttransfer"]
                assert choice["lazy_layers"] == one.choice["lazy_layers"], (length, order)
                assert answer["output_ids"] == one.tokens, (length, order)
                assert choice["origin"] == one.choice["origin"]
            cold.flush_cache()


def test_a_retracted_request_answers_as_if_it_had_not_been(cold: Server, reference: DynamicReference) -> None:
    """The pool runs full in decode: requests give their K and V up, come back, and go on as they began.

    They may end early, so admission hopes that they do. Short prompts too, whose output is longer than the
    first block by then.
    """
    rng = random.Random(32)
    lengths = [30, 40, BLOCK, 100, 150, 200, 250, 300, 120, 180]
    known = [alone(cold, length, 200, rng) for length in lengths]
    cold.flush_cache()
    marker = "KV cache pool is full. Retract requests."
    before = cold.log_text().count(marker)
    resumed = cold.lighttransfer()["layer_sets"]["resumed"]
    replies = cold.generate_together([prompt for prompt, _ in known], 200, ask=True, ignore_eos=False)
    assert cold.log_text().count(marker) > before, "nothing was retracted"
    for (prompt, first), again in zip(known, replies, strict=True):
        assert first.choice is not None and again.choice is not None
        assert again.choice["lazy_layers"] == first.choice["lazy_layers"], len(prompt)
        assert again.choice["origin"] == first.choice["origin"], len(prompt)
        assert again.tokens == first.tokens, len(prompt)
        result = Comparison(0, 0, [])
        lazy = first.choice["lazy_layers"]
        reference.compare_output(result, prompt, again.tokens, lazy, len(prompt))
        result.assert_equal()
    info = cold.lighttransfer()
    assert info["layer_sets"]["resumed"] > resumed, "all found their K and V still cached"
    assert info["memory"]["sink_requests"] == info["layer_sets"]["requests"] == 0


def test_what_an_answer_says_on_every_route(cold: Server) -> None:
    """Layers, scores and where they came from: with and without tokens, streamed, on the OpenAI routes."""
    prompt, one = alone(cold, 200, 8, random.Random(33))
    greedy = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "custom_params": ASK}
    text = {"model": "default", "prompt": prompt, **greedy}

    def told(answer: dict[str, Any]) -> list[dict[str, Any]]:
        return answer["metadata"]["lighttransfer"]

    cold.flush_cache()
    nothing = cold.generate(prompt, 0, ask=True)
    assert nothing.tokens == [] and nothing.choice == one.choice
    cold.flush_cache()
    (plain,) = told(cold.post("/v1/completions", text).json())
    assert plain == one.choice
    (repeat,) = told(cold.post("/v1/completions", text).json())
    assert repeat == {**one.choice, "origin": "prefix"}, "cached, and said so"
    cold.flush_cache()
    both = told(cold.post("/v1/completions", {**text, "prompt": [prompt, prompt[:30]]}).json())
    assert [entry["origin"] for entry in both] == ["prompt", "default"]
    cold.flush_cache()
    with cold.post("/v1/completions", {**text, "stream": True}, stream=True) as answer:
        chunks = list(events(answer))
    assert told(chunks[-1]) == [one.choice] and chunks[-1]["choices"] == []
    assert not any(chunk.get("metadata") for chunk in chunks[:-1])
    cold.flush_cache()
    parameters = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, "custom_params": ASK}
    body = {"input_ids": prompt, "sampling_params": parameters, "stream": True}
    with cold.post("/generate", body, stream=True) as answer:
        metas = [event["meta_info"] for event in events(answer)]
    assert [meta["lighttransfer"] for meta in metas] == [[one.choice]] * len(metas)

    del text["custom_params"]
    assert "lighttransfer" not in cold.post("/v1/completions", text).json()["metadata"]
