"""What goes over the wire: request bodies of three endpoints, and what their streams say.

One event of a stream is one or more tokens. The number of tokens comes from the server (``usage``,
``meta_info``), never from counting events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from lt_sglang.bench.traffic import as_text

PATHS = {"generate": "/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
DONE = b"[DONE]"


class StreamError(Exception):
    """The server reported an error inside a stream, or broke the format."""


@dataclass
class Answer:
    """What a stream has said so far.

    tokens: whether the last event carried any. cached_tokens: None where the server does not say; SGLang's
    OpenAI endpoints say it with --enable-cache-report.
    """

    tokens: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    output_ids: tuple[int, ...] = ()
    text: str = ""
    finish: str = ""


class History:
    """The prompt of a conversation's next turn, as its endpoint wants it.

    Args:
        api: one of PATHS.
        numbers_per_token: how many numbers of text make a token, for chat.
    """

    def __init__(self, api: str, numbers_per_token: float = 1.0) -> None:
        self._api = api
        self._numbers_per_token = numbers_per_token
        self._ids: list[int] = []
        self._messages: list[dict[str, str]] = []

    def add(self, tokens: Sequence[int]) -> None:
        """The user says ``tokens``."""
        self._ids.extend(tokens)
        numbers = max(1, round(len(tokens) * self._numbers_per_token))
        self._messages.append({"role": "user", "content": as_text(_stretched(tokens, numbers))})

    def answered(self, answer: Answer) -> None:
        """The model answered."""
        self._ids.extend(answer.output_ids)
        self._messages.append({"role": "assistant", "content": answer.text})

    def body(self, output_tokens: int, rid: str) -> dict[str, Any]:
        """A streaming request for exactly ``output_tokens``, greedy. Ends of text are ignored."""
        if self._api == "generate":
            sampling = {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}
            return {"input_ids": self._ids, "sampling_params": sampling, "stream": True, "rid": rid}
        prompt: dict[str, Any] = {"prompt": self._ids}
        if self._api == "chat":
            prompt = {"messages": self._messages}
        return {
            **prompt,
            "model": "default",
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "rid": rid,
        }


def read_event(api: str, data: bytes, answer: Answer) -> None:
    """Add one event's JSON to ``answer``; raises StreamError."""
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise StreamError(f"not JSON: {data[:80]!r} ({error})") from None
    if "error" in event:
        said = event["error"]
        raise StreamError(str(said.get("message", said) if isinstance(said, dict) else said))
    if api == "generate":
        _read_generate(event, answer)
    else:
        _read_openai(event, answer)


def _read_generate(event: dict[str, Any], answer: Answer) -> None:
    meta = event["meta_info"]
    finish = meta.get("finish_reason") or {}
    if finish.get("type") == "abort":
        raise StreamError(f"aborted by the server: {finish.get('message') or 'no reason given'}")
    produced = meta["completion_tokens"]
    answer.tokens = produced > answer.output_tokens
    ids = tuple(event.get("output_ids") or ())
    # Each event repeats all ids, unless the server streams incrementally.
    answer.output_ids = ids if len(ids) >= produced else answer.output_ids + ids
    answer.output_tokens = produced
    answer.input_tokens = meta["prompt_tokens"]
    answer.cached_tokens = meta.get("cached_tokens")
    answer.finish = finish.get("type", "")


def _read_openai(event: dict[str, Any], answer: Answer) -> None:
    answer.tokens = False
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or choice
        text = delta.get("content") or delta.get("reasoning_content") or delta.get("text") or ""
        answer.text += text
        answer.tokens = bool(text)
        answer.finish = choice.get("finish_reason") or answer.finish
    usage = event.get("usage")
    if usage:
        answer.input_tokens = usage["prompt_tokens"]
        answer.output_tokens = usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _stretched(tokens: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(tokens[number % len(tokens)] for number in range(count))
