"""One run of a scenario: what is still to be sent, what was measured, when it is over."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import requests

from lt_sglang.bench import metrics_page
from lt_sglang.bench.client import Request, send
from lt_sglang.bench.samples import ERROR, Sample
from lt_sglang.bench.scenario import Scenario
from lt_sglang.bench.traffic import Conversation, Turn, conversations
from lt_sglang.bench.wire import History
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.engine import server_info

# Prompts whose lengths tell how many tokens a number of text becomes.
CALIBRATION = (64, 512)
# Warm-up prompts must not be found in the prefix cache when the run sends its own.
WARMUP_SEED = 1_000_003
PHASE_SEED = 1_009
# One request decodes alone: 8K tokens would be a minute in which nothing is measured.
WARMUP_TOKENS = 16
CUT_OFF = "cut off: the user that sent it was stopped before its end"


class Session:
    """The state shared by all users of a run; everything here runs in one thread.

    Args:
        scenario: what to send.
        url: the server.
        sleep: waits some seconds while other users go on.

    Attributes:
        samples: one a request, in the order of their ends.
        server: what /metrics counted during the run; None before its end, or without /metrics.
        engine: model, version and lazy layers, as /server_info says at the end; empty without it.
        lt_metrics: the server's lt_* figures at the end.
        choices: how layers were chosen during the run, as `metrics_page.choices`.
        started_at: time.time() at the beginning of the run.
    """

    def __init__(self, scenario: Scenario, url: str, sleep: Callable[[float], Any]) -> None:
        self.scenario = scenario
        self.url = url
        self.samples: list[Sample] = []
        self.server: dict[str, float] | None = None
        self.engine: dict[str, Any] = {}
        self.lt_metrics: dict[str, float] = {}
        self.choices: dict[str, Any] = {}
        self.started_at = 0.0
        self._sleep = sleep
        self._run = uuid.uuid4().hex[:8]
        self._began = 0.0
        self._in_flight = 0
        self._plans: list[Iterator[Conversation]] = [conversations(one) for one in _parts(scenario)]
        self._in_phase = [0] * len(self._plans)
        self._left = scenario.load.requests
        self._numbers_per_token = 1.0
        self._before: str | None = None

    def prepare(self, client: Any) -> None:
        """Warm the server up and start the clock; raises LightTransferError if it answers none of it."""
        if self.scenario.api == "chat":
            self._calibrate(client)
        warm = conversations(self.scenario, self.scenario.seed + WARMUP_SEED)
        errors = []
        for _ in range(self.scenario.load.warmup):
            # Ids of their own: SGLang aborts a dropped request once more, by its id, two seconds later.
            played = self._play(client, _shortened(next(warm)), "warm")
            errors += [one.error for one in played if one.status == ERROR]
        if errors:
            raise LightTransferError(f"{self.url}: the warm-up failed: {errors[0]}")
        self._before = self._page()
        self.started_at, self._began = time.time(), time.perf_counter()

    def finish(self) -> None:
        """Read what the server counted, and what it is."""
        after = self._page()
        self.server = metrics_page.between(self._before, after)
        self.choices = metrics_page.choices(self._before, after)
        self.lt_metrics = metrics_page.lazy_layers(after)
        with contextlib.suppress(requests.RequestException, ValueError):
            self.engine = describe(server_info(self.url))

    def _page(self) -> str | None:
        """/metrics, in which everything that was answered before is counted."""
        page = metrics_page.scrape(self.url)
        if page is None or metrics_page.LAZY_REQUESTS not in page:
            return page
        self._sleep(metrics_page.PUBLISHED_S)
        return metrics_page.scrape(self.url)

    def progress(self) -> str:
        """How far it is, in a line."""
        errors = sum(one.status == ERROR for one in self.samples)
        seconds = time.perf_counter() - self._began
        left = "" if self._left is None else f", {self._left} conversations to send"
        answered = len(self.samples) - errors
        return f"{seconds:.0f} s: {answered} answered, {errors} errors, {self._in_flight} in flight{left}"

    @property
    def sending(self) -> bool:
        """Whether there is more to send."""
        seconds = self.scenario.load.length
        in_time = seconds is None or time.perf_counter() - self._began < seconds
        return self._left != 0 and in_time

    @property
    def over(self) -> bool:
        """Whether everything was sent and answered."""
        return not self.sending and not self._in_flight

    def take(self) -> Conversation | None:
        """The next conversation, counted as in flight until it was played; None if there is none now."""
        if not self.sending:
            return None
        load = self.scenario.load
        phase = load.phase_at(time.perf_counter() - self._began) or 0
        if load.phases and self._in_phase[phase] >= load.phases[phase].users:
            return None
        conversation = replace(next(self._plans[phase]), phase=phase)
        seconds = load.length
        if seconds is not None and conversation.at > seconds:
            self._left = 0
            return None
        if self._left is not None:
            self._left -= 1
        self._in_flight += 1
        self._in_phase[phase] += 1
        return conversation

    def wait_for(self, conversation: Conversation) -> None:
        """Sleep until an open-loop conversation is due."""
        self._sleep(max(0.0, conversation.at - (time.perf_counter() - self._began)))

    def play(self, client: Any, conversation: Conversation) -> None:
        """Send every turn of a conversation that was taken; stopping its user meanwhile is an error."""
        start = time.perf_counter() - self._began
        try:
            self.samples += self._play(client, conversation)
        except BaseException:
            spent = time.perf_counter() - self._began - start
            cut = Sample(
                conversation.index, 0, conversation.kind, ERROR, start, spent, None, 0, 0, error=CUT_OFF
            )
            self.samples.append(cut)
            raise
        finally:
            self._in_flight -= 1
            self._in_phase[conversation.phase] -= 1

    def _play(self, client: Any, conversation: Conversation, mark: str = "run") -> list[Sample]:
        history = History(self.scenario.api, self._numbers_per_token)
        played: list[Sample] = []
        for number, turn in enumerate(conversation.turns):
            if number and conversation.think_seconds:
                self._sleep(conversation.think_seconds)
            history.add(turn.added)
            rid = f"{self._run}-{mark}-{conversation.phase}-{conversation.index:08d}-{number:03d}-"
            sample, answer = send(
                client, self.scenario, Request(conversation, number, history, rid), self._began
            )
            played.append(sample)
            if sample.status != "ok":
                break
            history.answered(answer)
        return played

    def _calibrate(self, client: Any) -> None:
        lengths = []
        for count in CALIBRATION:
            one = Conversation(0, "calibration", 0.0, (Turn(tuple(range(100, 100 + count)), 1),))
            (sample,) = self._play(client, one, "calibration")
            if sample.status == ERROR:
                raise LightTransferError(f"{self.url}: {sample.error}")
            lengths.append(sample.input_tokens)
        self._numbers_per_token = (CALIBRATION[1] - CALIBRATION[0]) / (lengths[1] - lengths[0])


def _parts(scenario: Scenario) -> list[Scenario]:
    """The scenario of each phase; the scenario itself if it has none."""
    if not scenario.load.phases:
        return [scenario]
    return [
        replace(scenario, traffic=(kind,), seed=scenario.seed + PHASE_SEED * number)
        for number, kind in enumerate(scenario.traffic)
    ]


def describe(info: dict[str, Any]) -> dict[str, Any]:
    """What a report says of the server, from its /server_info."""
    state = (info.get("internal_states") or [{}])[0]
    lazy = state.get("lighttransfer") or {}
    names = ("model_path", "version", "attention_backend", "tp_size", "kv_cache_dtype")
    found = {name.replace("_", " "): info.get(name) for name in names}
    keys = ("mode", "lazy_layers", "score", "keep", "sink_tokens", "recent_tokens")
    told = ", ".join(f"{key.replace('_', ' ')} {lazy[key]}" for key in keys if lazy.get(key) is not None)
    found["lazy layers"] = told or "none: full attention"
    return {name: value for name, value in found.items() if value is not None}


def _shortened(conversation: Conversation) -> Conversation:
    """``conversation`` with few tokens of output, all of which are read."""
    turns = (
        replace(turn, output_tokens=min(turn.output_tokens, WARMUP_TOKENS), abort_after=None)
        for turn in conversation.turns
    )
    return replace(conversation, turns=tuple(turns))
