"""SinkStore under seeded churn against a simple model, and its own check of itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from lt_sglang.memory.sinks import SinkStore

from .sink_rig import SLOTS, Device, Request, request


def plant(name: str) -> Callable[[SinkStore], None]:
    def fault(store: SinkStore) -> None:
        entry = store._sets[("a",)]
        if name == "lost":
            store._free.pop()
        elif name == "doubled":
            store._free.append(entry.index)
        elif name == "another key":
            entry.key = ("z",)
        elif name == "does not use it":
            entry.users.add("ghost")
        elif name == "does not count it":
            entry.users.clear()

    return fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lost", "lost or doubled"),
        ("doubled", "lost or doubled"),
        ("another key", "another key"),
        ("does not use it", "ghost, which does not use it"),
        ("does not count it", "does not count it"),
    ],
)
def test_integrity_finds_planted_faults(fault: str, message: str) -> None:
    device = Device(3, 3)
    device.capture(request("a", 1))
    assert device.store.check_integrity() == []
    plant(fault)(device.store)
    wrong = device.store.check_integrity()
    assert any(message in sentence for sentence in wrong)


class Churn:
    """Requests that come, are computed, capture, share, end and come back, in SGLang's order of events.

    A slot is written in a forward only, which begins with a flush; a request captures once computed; slots of
    a request whose sinks are safe are given to others after the next flush.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.sink_tokens = self.rng.choice([1, 3])
        capacity = self.rng.randrange(1, 6)
        # Sometimes slots are scarcer than indices.
        slots = self.sink_tokens * (capacity if seed % 2 else self.rng.randint(1, capacity))
        self.device = Device(capacity, self.sink_tokens, rows=12, slots=slots)
        self.free_rows = list(range(12))
        self.free_slots = list(range(1, SLOTS + 1))
        self.admitted: list[Request] = []
        self.running: list[Request] = []
        self.left: list[Request] = []
        self.names = 0

    def admit(self) -> None:
        if not self.free_rows:
            return
        if self.left and self.rng.random() < 0.5:
            one = self.left.pop(self.rng.randrange(len(self.left)))  # retracted, now back
        else:
            self.names += 1
            one = Request(f"r{self.names}", (self.rng.randrange(8),))
        self.rng.shuffle(self.free_rows)
        one.row = self.free_rows.pop()
        one.slots = [self.free_slots.pop(0) for _ in range(self.sink_tokens)]
        self.admitted.append(one)

    def capture(self) -> None:
        if not self.running:
            return
        one = self.rng.choice(self.running)
        if self.device.capture(one):
            # Freed for the next forward, which flushes before it writes.
            self.free_slots[:0] = one.slots
            one.slots = []
        else:
            users = {other.key for other in self.running if self.device.store.holds(other.name)}
            most = min(self.device.store.capacity, len(self.device.source.all) // self.sink_tokens)
            assert len(users) == most, "refused though a set was idle, or slots were free"

    def end(self) -> None:
        if not self.running:
            return
        gone = self.running.pop(self.rng.randrange(len(self.running)))
        self.device.store.release(gone.name)
        assert gone.row is not None
        self.free_rows.append(gone.row)
        self.free_slots[:0] = gone.slots
        gone.row, gone.slots = None, []
        self.left.append(gone)

    def forward(self) -> None:
        self.device.flush()
        for one in self.admitted:
            self.device.write(one, self.content(one)[0])
        self.running += self.admitted
        self.admitted = []
        for one in self.running:
            assert one.row is not None
            if self.device.store.holds(one.name):
                assert self.device.stored(one.row) == self.content(one)
            else:
                assert self.device.stored(one.row) is None
                assert self.device.buffer[one.slots].tolist() == self.content(one)

    def content(self, one: Request) -> list[int]:
        return [int(str(one.key[0])) * 1000 + position for position in range(self.sink_tokens)]


@pytest.mark.parametrize("seed", range(8))
def test_churn(seed: int) -> None:
    churn = Churn(seed)
    store = churn.device.store
    for _ in range(400):
        for _ in range(churn.rng.randrange(0, 5)):
            step = churn.rng.choices([churn.admit, churn.capture, churn.end, store.clear], [30, 40, 28, 2])[0]
            step()
        assert store.check_integrity() == []
        free, all_slots = len(churn.device.source.free), len(churn.device.source.all)
        assert free + store.used * churn.sink_tokens == all_slots, "a slot is lost, or a set has too many"
        churn.forward()
    assert store.stats.captured > 5
    assert store.stats.shared > 5


def test_a_request_that_asks_again_and_again_is_refused_once() -> None:
    device = Device(capacity=1, sink_tokens=3)
    assert device.capture(request("a", row=1))
    others = [request("b", row=2, first_slot=5), request("c", row=3, first_slot=9)]
    for _ in range(100):
        assert not any(device.capture(other) for other in others)
    assert device.store.stats.refused == 2
    device.store.release("b")  # it is retracted, and comes back
    assert not device.capture(others[0])
    assert device.store.stats.refused == 3
    device.store.release("a")
    assert device.capture(others[1])
    assert (device.store.stats.captured, device.store.stats.refused) == (2, 3)
