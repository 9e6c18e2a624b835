"""Wrapped functions that carry what a request is told of its layers into its answer, on every route.

A request asks with ``custom_params: {"lighttransfer": true}``; the radix cache answers (``report``). Here the
answer is sent once a request, whatever its number of tokens, and put where the OpenAI routes have room.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lt_sglang.config import CONFIG_KEY

DONE = "data: [DONE]"


def output_streamer_class(original: Callable[[Any], type], scheduler: Any) -> type:
    """SGLang's output streamer, which asks the radix cache before it sends and sends the answer whole."""
    stock: Any = original(scheduler)

    class Streamer(stock):
        def stream_output(self, reqs: list[Any], *args: Any, **kwargs: Any) -> None:
            report = getattr(self.tree_cache, "report", None)
            if report is not None:
                for req in reqs:
                    report(req)
            with _kept_for_later(reqs):
                super().stream_output(reqs, *args, **kwargs)

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == CONFIG_KEY or bool(super().is_request_level_customized_info_key(key))

    Streamer.__name__ = Streamer.__qualname__ = stock.__name__
    return Streamer


@contextmanager
def _kept_for_later(reqs: list[Any]) -> Iterator[None]:
    """A stream's event without tokens is followed by another first one, and would tell its client twice."""
    waiting = [
        (req, req.customized_info)
        for req in reqs
        if req.stream and not req.finished() and not req.output_ids and req.customized_info
    ]
    for req, known in waiting:
        req.customized_info = {key: value for key, value in known.items() if key != CONFIG_KEY}
    try:
        yield
    finally:
        for req, known in waiting:
            req.customized_info = known


def build_response(original: Callable[..., Any], serving: Any, request: Any, ret: Any, created: Any) -> Any:
    """Add ``metadata.lighttransfer``, a list with one entry a choice, to an OpenAI answer."""
    response = original(serving, request, ret, created)
    told = [_told(item.get("meta_info") or {}) for item in ret]
    if any(entry is not None for entry in told) and hasattr(response, "metadata"):
        response.metadata = {**(response.metadata or {}), CONFIG_KEY: told}
    return response


def stream_completion(original: Callable[..., Any], serving: Any, *args: Any, **kwargs: Any) -> Any:
    """As ``build_response``, in an event of its own before a stream's end."""
    return _stream(original, serving, "text_completion", *args, **kwargs)


def stream_chat(original: Callable[..., Any], serving: Any, *args: Any, **kwargs: Any) -> Any:
    """As ``stream_completion``, for chats."""
    return _stream(original, serving, "chat.completion.chunk", *args, **kwargs)


async def _stream(
    original: Callable[..., Any], serving: Any, kind: str, adapted: Any, request: Any, raw_request: Any
) -> AsyncIterator[str]:
    parameters = getattr(request, "custom_params", None)
    if not isinstance(parameters, dict) or not parameters.get(CONFIG_KEY):
        async for event in original(serving, adapted, request, raw_request):
            yield event
        return
    heard = _Listening(serving.tokenizer_manager)
    listening = copy.copy(serving)
    listening.tokenizer_manager = heard
    async for event in original(listening, adapted, request, raw_request):
        if event.startswith(DONE) and heard.told:
            told = [heard.told.get(index) for index in range(max(heard.told) + 1)]
            last = {
                "id": heard.id,
                "object": kind,
                "created": int(time.time()),
                "model": request.model,
                "choices": [],
                "metadata": {CONFIG_KEY: told},
            }
            yield f"data: {json.dumps(last)}\n\n"
        yield event


class _Listening:
    """SGLang's tokenizer manager, noting what the requests of one stream are told; by choice."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.told: dict[int, dict[str, object]] = {}
        self.id = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def generate_request(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for content in self._manager.generate_request(*args, **kwargs):
            meta = content.get("meta_info") or {}
            entry = _told(meta)
            if entry is not None:
                self.told[content.get("index", 0)] = entry
                self.id = meta.get("id", self.id)
            yield content


def _told(meta: dict[str, Any]) -> dict[str, object] | None:
    entries = meta.get(CONFIG_KEY) or [None]
    entry: dict[str, object] | None = entries[0]
    return entry
