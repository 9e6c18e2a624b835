"""lt_sglang.hooks.queue_watch: a queue that can never move is seen, and one request of it is ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lt_sglang.hooks import queue_watch as watch
from lt_sglang.hooks.queue_watch import ROUNDS, STUCK_SECONDS, QueueWatch
from lt_sglang.hooks.wrappers import abort_stuck


class Batch:
    """A ScheduleBatch that knows how many requests it has."""

    def __init__(self, size: int = 0) -> None:
        self.size = size

    def is_empty(self) -> bool:
        return self.size == 0


class Units:
    """A UnitList with 20 of 90 free."""

    size = 90

    def __len__(self) -> int:
        return 20


def request(rid: str) -> Any:
    return SimpleNamespace(
        rid=rid,
        origin_input_ids=[1] * 700,
        sampling_params=SimpleNamespace(max_new_tokens=50),
        discard_output_reason=None,
    )


def scheduler(**changes: Any) -> Any:
    """One that stands still: requests wait, nothing runs."""
    fields = {
        "waiting_queue": [request("first"), request("second")],
        "chunked_req": None,
        "running_batch": Batch(),
        "last_batch": None,
        "result_queue": [],
        "_engine_paused": False,
        "token_to_kv_pool_allocator": SimpleNamespace(
            full_available_size=lambda: 100,
            size_full=800,
            full_is_limited=True,
            units=Units(),
            evictable_units=lambda tree: 4,
        ),
        "tree_cache": SimpleNamespace(full_evictable_size=lambda: 11, sinks=object()),
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def looks(made: QueueWatch, of: Any, clock: list[float], seconds: float, rounds: int) -> list[Any]:
    aborts = []
    for _ in range(rounds):
        clock[0] += seconds / rounds
        aborts += made.look(of)
    return aborts


def test_the_first_of_a_queue_that_stands_still_is_ended(clock: list[float]) -> None:
    made, stuck = QueueWatch(), scheduler()
    (abort,) = looks(made, stuck, clock, STUCK_SECONDS + 1, 3 * ROUNDS)
    assert abort.rid == "first" and not abort.abort_all
    reason = abort.finished_reason
    assert reason["type"] == "abort" and reason["status_code"] == 503
    for number in ("700 prompt tokens", "50 new", "24 of 90 units", "111 of at most 800 tokens"):
        assert number in reason["message"]
    assert made.look(stuck) == [], "the next one is given time of its own"
    stuck.token_to_kv_pool_allocator.full_is_limited = False
    (abort,) = looks(made, stuck, clock, STUCK_SECONDS + 1, 3 * ROUNDS)
    assert abort.finished_reason["message"].endswith("with 24 of 90 units of KV memory free.")


def test_a_prompt_parked_between_chunks_is_what_the_others_wait_for(clock: list[float]) -> None:
    parked = request("parked")
    stuck = scheduler(chunked_req=parked)
    (abort,) = looks(QueueWatch(), stuck, clock, STUCK_SECONDS + 1, 2 * ROUNDS)
    assert abort.rid == "parked"
    # SGLang takes its words for the client from here.
    assert parked.discard_output_reason.status_code == 503
    assert looks(QueueWatch(), scheduler(chunked_req=parked, waiting_queue=[]), clock, 20, ROUNDS + 1)


@pytest.mark.parametrize(
    "moving",
    [
        {"waiting_queue": []},
        {"running_batch": Batch(1)},
        {"last_batch": Batch(1)},
        {"result_queue": [object()]},
        {"_engine_paused": True},
    ],
    ids=lambda moving: next(iter(moving)),
)
def test_nothing_else_is_touched(moving: dict[str, Any], clock: list[float]) -> None:
    assert looks(QueueWatch(), scheduler(**moving), clock, 100, 5 * ROUNDS) == []


def test_neither_a_long_round_nor_many_short_ones_are_enough(clock: list[float]) -> None:
    """A weight update in between takes long; an idle scheduler passes thousands of rounds a second."""
    assert looks(QueueWatch(), scheduler(), clock, 100, ROUNDS - 1) == []
    assert looks(QueueWatch(), scheduler(), clock, STUCK_SECONDS - 0.5, 50 * ROUNDS) == []


def test_what_moves_in_between_starts_the_time_again(clock: list[float]) -> None:
    made = QueueWatch()
    assert looks(made, scheduler(), clock, STUCK_SECONDS - 1, 2 * ROUNDS) == []
    assert made.look(scheduler(running_batch=Batch(1))) == []
    assert looks(made, scheduler(), clock, STUCK_SECONDS - 1, 2 * ROUNDS) == []


def test_the_hook_adds_to_what_sglang_ends(clock: list[float]) -> None:
    stuck = scheduler()
    found: list[Any] = []
    for _ in range(2 * ROUNDS):
        clock[0] += 0.1
        found += abort_stuck(lambda _: ["timeout"], stuck)
    assert [item for item in found if item != "timeout"] and found.count("timeout") == 2 * ROUNDS
    stock = scheduler(tree_cache=SimpleNamespace())
    assert abort_stuck(lambda _: ["timeout"], stock) == ["timeout"] and not hasattr(stock, "lt_watch")
