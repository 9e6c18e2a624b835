"""lt_sglang.hooks.answers and the prefill hooks, without a server: who is told what, and where chunks end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult

from lt_sglang.hooks import answers, wrappers

TOLD = {"lazy_layers": [1], "laziness": None, "origin": "static"}


class Manager:
    """A tokenizer manager with two choices; the second is told of its layers in its first event only."""

    server_args = "as before"

    async def generate_request(self, *_: Any) -> AsyncIterator[dict[str, Any]]:
        yield {"index": 1, "meta_info": {"id": "x", "lighttransfer": [TOLD]}}
        yield {"index": 0, "meta_info": {"id": "x"}}
        yield {"index": 1, "meta_info": {"id": "x"}}


async def stock_stream(serving: Any, *_: Any) -> AsyncIterator[str]:
    assert serving.tokenizer_manager.server_args == "as before"
    async for content in serving.tokenizer_manager.generate_request(None, None):
        yield f"data: {content['index']}\n\n"
    yield "data: [DONE]\n\n"


def stream(custom_params: Any) -> list[str]:
    serving = SimpleNamespace(tokenizer_manager=Manager())
    request = SimpleNamespace(custom_params=custom_params, model="m")

    async def run() -> list[str]:
        found = answers.stream_completion(stock_stream, serving, None, request, None)
        return [event async for event in found]

    events = asyncio.run(run())
    assert type(serving.tokenizer_manager) is Manager, "only this stream was listened to"
    return events


def test_a_stream_that_asks_ends_with_what_it_is_told() -> None:
    events = stream({"lighttransfer": True})
    assert events[:3] == ["data: 1\n\n", "data: 0\n\n", "data: 1\n\n"]
    last = json.loads(events[3].removeprefix("data: "))
    assert last["metadata"] == {"lighttransfer": [None, TOLD]}
    assert (last["choices"], last["id"], last["model"]) == ([], "x", "m")
    assert events[4:] == ["data: [DONE]\n\n"]


@pytest.mark.parametrize(("stream", "tokens"), [(True, 0), (True, 1), (False, 0)])
def test_an_event_of_a_stream_without_tokens_tells_nothing(stream: bool, tokens: int) -> None:
    """SGLang sends what a request is told with every event of a stream that has sent no token before."""
    sent: list[Any] = []

    class Stock:
        tree_cache = None

        def stream_output(self, reqs: list[Any]) -> None:
            sent.extend(req.customized_info for req in reqs)

    made = answers.output_streamer_class(lambda scheduler: Stock, None)()
    told = {"lighttransfer": [TOLD], "other": [1]}
    req = SimpleNamespace(
        stream=stream, output_ids=[1] * tokens, finished=lambda: False, customized_info=dict(told)
    )
    made.stream_output([req])
    assert sent == [told if tokens or not stream else {"other": [1]}]
    assert req.customized_info == told, "it is told with the first token"


@pytest.mark.parametrize("custom_params", [None, {}, {"lighttransfer": False}, [1]], ids=str)
def test_a_stream_that_does_not_ask_is_as_it_was(custom_params: Any) -> None:
    assert len(stream(custom_params)) == 4


def test_a_response_has_one_entry_a_choice() -> None:
    def build(serving: Any, request: Any, ret: Any, created: Any) -> Any:
        return SimpleNamespace(metadata={"weight_version": "w"})

    ret = [{"meta_info": {"lighttransfer": [TOLD]}}, {"meta_info": {"lighttransfer": []}}]
    assert answers.build_response(build, None, None, ret, 0).metadata == {
        "weight_version": "w",
        "lighttransfer": [TOLD, None],
    }
    assert answers.build_response(build, None, None, ret[1:], 0).metadata == {"weight_version": "w"}


class Adder:
    """SGLang's PrefillAdder as the hooks see it."""

    def __init__(self, limit: int | None, rem_chunk_tokens: int | None = 256) -> None:
        self.tree_cache = SimpleNamespace(chunk_limit=lambda req: limit)
        self.rem_chunk_tokens = rem_chunk_tokens
        self.new_chunked_req = None
        self.considered: list[Any] = []
        self.memory_budget = SimpleNamespace(consider=lambda req, *_: self.considered.append(req))


@pytest.mark.parametrize(
    ("limit", "given", "seen"), [(100, 256, 100), (300, 256, 256), (None, 256, 256), (100, None, None)]
)
def test_a_chunk_ends_where_the_cache_says(limit: int | None, given: int | None, seen: int | None) -> None:
    adder = Adder(limit, given)
    found = []

    def admit(adder: Any, req: Any, **_: Any) -> object:
        found.append(adder.rem_chunk_tokens)
        return object()

    wrappers.select_admission(admit, adder, "req", has_chunked_req=False)
    wrappers.add_ignore_eos(admit, Adder(limit, given), "req")
    assert found == [seen, seen]
    assert adder.considered == ["req"], "the budget is told whose tokens it reckons"


def test_who_is_refused_leaves_the_budget_as_it_was() -> None:
    adder = Adder(100)
    result = wrappers.select_admission(lambda *_, **__: AddReqResult.NO_TOKEN, adder, "req")
    assert (result, adder.rem_chunk_tokens) == (AddReqResult.NO_TOKEN, 256)


def test_who_cannot_have_its_sinks_waits() -> None:
    """They are in host memory, and no slot is free for them; nothing is reckoned or admitted."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("admitted")

    adder = Adder(None)
    asked: list[Any] = []
    adder.tree_cache.bring_sinks = lambda req, hold: asked.append(req)
    assert wrappers.select_admission(never, adder, "req") is AddReqResult.NO_TOKEN
    assert asked == ["req"] and adder.considered == []


def test_one_request_at_a_time_is_between_chunks() -> None:
    """SGLang stops with an assertion if two are."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("admitted")

    adder = Adder(100)
    assert wrappers.select_admission(never, adder, "req", has_chunked_req=True) is AddReqResult.OTHER
    assert wrappers.add_chunk(lambda *_: "unfinished", adder, "other") == "unfinished"
    assert wrappers.add_ignore_eos(never, adder, "req") is AddReqResult.OTHER
