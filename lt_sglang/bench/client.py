"""Send one streaming request with locust's client and time its tokens."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from typing import Any

import orjson

from lt_sglang.bench.samples import ABORTED, ERROR, OK, Sample
from lt_sglang.bench.scenario import Scenario
from lt_sglang.bench.traffic import Conversation, Turn
from lt_sglang.bench.wire import DONE, PATHS, Answer, History, StreamError, read_event
from lt_sglang.launch.admin import KEY_VARIABLE, admin_headers

EVENT = b"data: "
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Request:
    """One turn of a conversation, ready to be sent. rid: no other's begins alike, for /abort_request."""

    conversation: Conversation
    number: int
    history: History
    rid: str

    @property
    def turn(self) -> Turn:
        """The tokens that this turn adds, and how many it asks for."""
        return self.conversation.turns[self.number]


def send(client: Any, scenario: Scenario, request: Request, began: float) -> tuple[Sample, Answer]:
    """Send ``request`` and read its stream; errors become a sample, too.

    client: a locust FastHttpSession. began: perf_counter of the run's start.

    Lines are read with ``readline``: FastHttpSession's ``iter_lines`` waits for 1024 bytes at a time, and a
    TTFT measured with it is the time of the whole answer.
    """
    turn, answer = request.turn, Answer()
    body = orjson.dumps(request.history.body(turn.output_tokens, request.rid))
    path = PATHS[scenario.api]
    status, problem = OK, ""
    tokens_at: list[float] = []
    start = end = time.perf_counter()
    with client.post(path, data=body, headers=HEADERS, stream=True, catch_response=True) as response:
        try:
            if response.status_code != 200:
                raise StreamError(_refusal(response))
            stream = response.stream
            while line := stream.readline(b"\n"):
                if not line.startswith(EVENT):
                    continue
                now = time.perf_counter()
                data = bytes(line[len(EVENT) :]).strip()
                if data == DONE:
                    break
                read_event(scenario.api, data, answer)
                if answer.tokens:
                    tokens_at.append(now)
                    if turn.abort_after is not None and len(tokens_at) >= turn.abort_after:
                        status = ABORTED
                        break
            end = time.perf_counter()
            if status == ABORTED:
                _give_up(client, scenario, request, response)
            elif answer.output_tokens != turn.output_tokens:
                raise StreamError(
                    f"{answer.output_tokens} of {turn.output_tokens} tokens, finish {answer.finish or 'none'}"
                )
        except Exception as error:  # whatever it is, a request without an answer is a failed one
            end = time.perf_counter()
            status, problem = ERROR, f"{type(error).__name__}: {error}"[:300]
        response.request_meta["response_time"] = 1000 * (end - start)
        response.request_meta["name"] = f"{path} ({request.conversation.kind})"
        if status == ERROR:
            response.failure(problem)
        else:
            response.success()
    ttft = tokens_at[0] - start if tokens_at else None
    if ttft is not None:
        _show_ttft(client, path, request, ttft)
    gaps = tuple(after - before for before, after in itertools.pairwise(tokens_at))
    sample = Sample(
        index=request.conversation.index,
        turn=request.number,
        kind=request.conversation.kind,
        status=status,
        start=start - began,
        e2e=end - start,
        ttft=ttft,
        input_tokens=answer.input_tokens,
        # An endpoint that reports usage last has not said how many there were when we gave up.
        output_tokens=answer.output_tokens or len(tokens_at),
        cached_tokens=answer.cached_tokens,
        itls=gaps,
        error=problem,
    )
    return sample, answer


def _give_up(client: Any, scenario: Scenario, request: Request, response: Any) -> None:
    # The answer is not read to its end, so this closes the connection.
    response.stream.release()
    if scenario.aborts.how == "abort_request":
        headers = admin_headers(os.environ.get(KEY_VARIABLE))
        answer = client.post("/abort_request", json={"rid": request.rid}, headers=headers)
        if answer.status_code in (401, 403):
            raise StreamError(f"/abort_request asks for the server's admin key: set {KEY_VARIABLE}")
        answer.raise_for_status()


def _refusal(response: Any) -> str:
    if not response.status_code:
        return f"no connection: {response.error}"
    return f"HTTP {response.status_code}: {(response.text or '')[:200]}"


def _show_ttft(client: Any, path: str, request: Request, ttft: float) -> None:
    """A line of its own in locust's statistics and charts."""
    client.request_event.fire(
        request_type="TTFT",
        name=f"{path} ({request.conversation.kind})",
        response_time=1000 * ttft,
        response_length=0,
        exception=None,
        context={},
    )
