"""Send one hostile request with an innocent one beside it, and say what must not have happened."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.engine.server import Server

CORPUS = Path(__file__).parent / "corpus"
# Longer than any answer of the small models; a request that takes longer is parked.
PATIENCE = 30.0
INNOCENT = {
    "input_ids": list(range(20, 50)),
    "sampling_params": {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True},
}
# What Python writes above an exception, and nobody outside may read.
TRACES = ("Traceback (most recent call last)", 'File "/', 'File \\"/', "site-packages")
# Where SGLang answers 500 for a fault of the input. None of them reaches the engine or says more than that.
FAILS = {
    "/parse_function_call": "an unknown parser; SGLang looks it up outside of its error handling",
    "/separate_reasoning": "an unknown parser; SGLang looks it up outside of its error handling",
    "/v1/detokenize": "a negative token; the tokenizer's OverflowError is taken for a fault of the server",
    "/vertex_generate": "an unknown parameter; the request object is made outside of its error handling",
    "/api/chat": "errors of the Ollama routes are not handled, streams end in the middle",
    "/api/generate": "errors of the Ollama routes are not handled, streams end in the middle",
}


@dataclass(frozen=True)
class Entry:
    """One hostile request of the corpus.

    expect: "refused" (4xx, or an error event of a stream), "answered" (2xx), or "any" of both. raw: the body
    as text, between before and after, so many times. kills: it was seen to end or to park a server with
    LT_SGLANG_GUARD=off; of the others that was not tried.
    """

    name: str
    route: str
    expect: str
    body: Any = None
    raw: str | None = None
    times: int = 1
    before: str = ""
    after: str = ""
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    kills: bool = False
    why: str = ""

    @property
    def data(self) -> bytes:
        """The bytes of the body."""
        text = json.dumps(self.body)
        if self.raw is not None:
            text = self.before + self.raw * self.times + self.after
        return text.encode()


def corpus() -> list[Entry]:
    """Every entry of every file of the corpus."""
    return [
        Entry(**entry) for file in sorted(CORPUS.glob("*.json")) for entry in json.loads(file.read_text())
    ]


class Probe:
    """A server under attack: ``send`` a request, ``check`` what it did to the innocent one beside it."""

    def __init__(self, server: Server, keys: Mapping[str, str] | None = None) -> None:
        self.server = server
        self.keys = dict(keys or {})
        self.expected = self._innocent()
        self.sent = 0

    def send(
        self,
        method: str,
        route: str,
        data: bytes | None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> requests.Response:
        """One request while an innocent one runs; AssertionError if that one is not answered as alone."""
        self.sent += 1
        beside: list[Any] = []
        thread = threading.Thread(target=lambda: beside.append(self._try_innocent()))
        thread.start()
        try:
            answer = requests.request(
                method,
                f"{self.server.url}{route}",
                data=data,
                headers={"Content-Type": "application/json", **self.keys, **(headers or {})},
                timeout=PATIENCE,
                stream=True,
                **options,
            )
            text = _read(answer)
        except requests.RequestException as error:
            what = f"{method} {route} {(data or b'')[:300]!r}: {type(error).__name__}: {error}"
            raise AssertionError(f"{what}\n{self.server.log_tail()}") from error
        finally:
            thread.join()
        what = f"{method} {route} {(data or b'')[:300]!r} -> {answer.status_code} {text[:300]!r}"
        assert beside == [self.expected], f"{what}\nthe request beside it: {beside}\n{self.server.log_tail()}"
        assert not any(trace in text for trace in TRACES), f"a traceback reached the client: {what}"
        return answer

    def _innocent(self) -> list[int]:
        answer = requests.post(
            f"{self.server.url}/generate", json=INNOCENT, timeout=PATIENCE, headers=self.keys
        )
        answer.raise_for_status()
        tokens: list[int] = answer.json()["output_ids"]
        return tokens

    def _try_innocent(self) -> Any:
        try:
            return self._innocent()
        except requests.RequestException as error:
            return f"{type(error).__name__}: {error}"


def _read(answer: requests.Response) -> str:
    """The body; an answer that breaks off counts as a 500."""
    try:
        return answer.text
    except requests.exceptions.ChunkedEncodingError:
        answer.status_code = 500
        answer._content = b""
        return ""


def outcome(answer: requests.Response) -> str:
    """One of refused, answered and failed, whether the answer is one object or a stream of events."""
    if answer.status_code >= 500:
        return "failed"
    if answer.status_code >= 400:
        return "refused"
    codes = [error_code(event) for event in stream_events(answer)]
    if any(code is not None and code >= 500 for code in codes):
        return "failed"
    return "refused" if any(code is not None for code in codes) else "answered"


def stream_events(answer: requests.Response) -> Sequence[Any]:
    """The JSON objects of a server-sent event stream; none for other answers."""
    if "text/event-stream" not in answer.headers.get("content-type", ""):
        return []
    lines = [line[len("data: ") :] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def error_code(event: Any) -> int | None:
    """The HTTP status that an event reports, None if it reports no error."""
    error = event.get("error") if isinstance(event, dict) else None
    if not isinstance(error, dict):
        return None
    code = error.get("code")
    return code if isinstance(code, int) else 400
