"""lt_sglang.memory.sinks: the store's order of events, by hand and by seeded churn against a simple model."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from lt_sglang.memory.sinks import SinkKey, SinkStore

SLOTS = 60
BASE = SLOTS + 1


@dataclass
class Request:
    """A running request: its row of req_to_token (None before and after), and its sinks' slots."""

    name: str
    key: SinkKey
    row: int | None = None
    slots: list[int] = field(default_factory=list)

    def where(self) -> int | None:
        return self.row


class Device:
    """One streaming buffer of whole numbers, and the store under test."""

    def __init__(self, capacity: int, sink_tokens: int, rows: int = 16) -> None:
        self.store = SinkStore(capacity, sink_tokens, rows, "cpu")
        self.buffer = torch.zeros(BASE + capacity * sink_tokens, dtype=torch.int64)
        self.copies = 0

    def write(self, request: Request, value: int) -> None:
        """The forward that computes the request's sinks: position i holds value + i."""
        for position, slot in enumerate(request.slots):
            self.buffer[slot] = value + position

    def capture(self, request: Request) -> bool:
        return self.store.capture(
            request.name, request.key, request.where, lambda: torch.tensor(request.slots)
        )

    def flush(self) -> None:
        def copy(target: torch.Tensor, source: torch.Tensor) -> None:
            self.copies += len(target)
            self.buffer[target] = self.buffer[source]

        self.store.flush(BASE, copy)

    def stored(self, row: int) -> list[int] | None:
        """What the request in ``row`` reads as its sinks, or None if it reads its own slots."""
        index = int(self.store.set_of[row])
        if index < 0:
            return None
        first = BASE + index * self.store.sink_tokens
        return self.buffer[first : first + self.store.sink_tokens].tolist()


def request(name: str, row: int, key: str = "", first_slot: int = 1) -> Request:
    return Request(name, (key or name,), row, list(range(first_slot, first_slot + 3)))


def test_the_table_is_where_and_what_it_is_said_to_be() -> None:
    table = SinkStore(2, 3, 16, "meta").set_of
    assert (tuple(table.shape), table.dtype, table.device.type) == ((16,), torch.int32, "meta")


def test_capture_copies_and_points_at_flush() -> None:
    device = Device(capacity=2, sink_tokens=3)
    one = request("a", row=5)
    device.write(one, 100)
    assert device.capture(one)
    assert device.stored(5) is None, "nothing happens before the flush"
    device.flush()
    assert device.stored(5) == [100, 101, 102]
    assert (device.store.used, device.store.in_use, device.store.requests) == (1, 1, 1)
    device.flush()
    assert device.copies == 3, "a flush does its work once"


def test_slots_of_a_gpu_are_kept_until_the_copy_has_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were made on the scheduler's stream; the allocator must not reuse their memory before."""
    seen: list[object] = []

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

        def record_stream(self, stream: object) -> None:
            seen.append(stream)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    device, slots = Device(2, 3), torch.tensor([1, 2, 3]).as_subclass(OnGpu)
    device.buffer[1:4] = torch.tensor([7, 8, 9])
    device.store.capture("a", ("a",), lambda: 5, lambda: slots)
    device.flush()
    assert seen == [("stream of", slots.device)] and device.stored(5) == [7, 8, 9]


def test_capture_twice_is_capture_once() -> None:
    device = Device(2, 3)
    one = request("a", row=5)
    assert device.capture(one) and device.capture(one)
    assert device.store.holds("a")
    assert device.store.stats.captured == 1
    assert device.store.used == 1


def test_requests_that_begin_alike_share_a_set() -> None:
    device = Device(1, 3)
    one, two = request("a", 5, key="same"), request("b", 6, key="same", first_slot=10)
    device.write(one, 100)
    assert device.capture(one) and device.capture(two)
    device.flush()
    assert device.stored(5) == device.stored(6) == [100, 101, 102]
    assert device.copies == 3
    assert (device.store.stats.captured, device.store.stats.shared) == (1, 1)
    device.store.release("a")
    assert device.store.in_use == 1
    device.store.release("b")
    assert device.store.in_use == 0
    assert device.store.used == 1, "kept for the next request that begins alike"


def test_adopt_needs_a_stored_set() -> None:
    device = Device(2, 3)
    one, two = request("a", 5, key="k"), request("b", 6, key="k")
    assert not device.store.adopt("b", two.key, two.where)
    assert not device.store.holds("b")
    device.write(one, 7)
    device.capture(one)
    device.store.release("a")
    assert device.store.adopt("b", two.key, two.where)
    device.flush()
    assert device.stored(6) == [7, 8, 9]
    assert device.stored(5) is None


def test_the_least_recently_used_idle_set_is_evicted() -> None:
    device = Device(2, 3)
    for name, row in (("a", 1), ("b", 2)):
        device.capture(request(name, row))
        device.store.release(name)
    assert device.store.touch(("a",))
    device.capture(request("c", 3))
    assert ("b",) not in device.store
    assert ("a",) in device.store
    assert device.store.stats.evicted == 1
    device.capture(request("d", 4))
    assert ("a",) not in device.store
    assert device.store.stats.evicted == 2


def test_a_set_in_use_is_never_evicted() -> None:
    device = Device(1, 3)
    first = request("a", 1)
    device.write(first, 50)
    assert device.capture(first)
    device.flush()
    called: list[int] = []

    def slots() -> torch.Tensor:
        called.append(1)
        return torch.tensor([9, 9, 9])

    assert not device.store.capture("b", ("b",), lambda: 2, slots)
    assert not called, "a refused capture changes nothing"
    assert not device.store.holds("b")
    assert device.store.stats.refused == 1
    device.flush()
    assert device.stored(1) == [50, 51, 52]
    assert device.stored(2) is None
    device.store.release("a")
    assert device.store.capture("b", ("b",), lambda: 2, slots)


def test_release_before_the_flush_leaves_the_row_alone() -> None:
    device = Device(2, 3)
    one = request("a", row=5)
    device.write(one, 100)
    device.capture(one)
    device.store.release("a")
    one.row = None
    device.flush()
    assert device.stored(5) is None
    # The set was filled all the same: the next request may use it.
    two = request("b", row=6, key="a")
    assert device.store.adopt("b", two.key, two.where)
    device.flush()
    assert device.stored(6) == [100, 101, 102]


def test_a_row_given_on_before_the_flush_belongs_to_its_new_request() -> None:
    device = Device(2, 3)
    one, two = request("a", row=5), request("b", row=5, first_slot=10)
    device.write(one, 100)
    device.write(two, 200)
    device.capture(one)
    device.store.release("a")
    one.row = None
    device.capture(two)
    device.flush()
    assert device.stored(5) == [200, 201, 202]


def test_a_request_readmitted_before_the_flush_does_not_inherit_its_old_set() -> None:
    device = Device(2, 3)
    one = request("a", row=5)
    device.capture(one)
    device.store.release("a")
    one.row = 9  # retracted and admitted again, before any forward ran
    device.flush()
    assert device.stored(5) is None
    assert device.stored(9) is None, "its sinks are still in its own slots"


def test_evicted_and_reused_before_the_flush() -> None:
    device = Device(1, 3)
    one, two = request("a", 5), request("b", 6, first_slot=10)
    device.write(one, 100)
    device.write(two, 200)
    device.capture(one)
    device.store.release("a")
    one.row = None
    assert device.capture(two)
    assert device.store.stats.evicted == 1
    device.flush()
    assert device.stored(6) == [200, 201, 202]
    assert device.stored(5) is None
    assert device.copies == 3, "the superseded copy is not made: its source may be gone"


def test_clear_forgets_idle_sets_only() -> None:
    device = Device(2, 3)
    device.capture(request("a", 1))
    device.capture(request("b", 2))
    device.store.release("b")
    device.store.clear()
    assert ("a",) in device.store
    assert ("b",) not in device.store
    assert device.store.check_integrity() == []
    assert device.capture(request("c", 3))


def test_release_of_an_unknown_request_is_harmless() -> None:
    device = Device(1, 3)
    device.store.release("nobody")
    device.flush()
    assert device.store.check_integrity() == []


def test_without_sinks_every_request_is_safe_at_once() -> None:
    store = SinkStore(0, 0, 4, "cpu")
    assert store.capture("a", (), lambda: 1, lambda: torch.empty(0, dtype=torch.int64))
    assert store.adopt("a", (), lambda: 1)
    assert store.holds("a") and store.touch(())
    store.release("a")
    store.flush(10, lambda target, source: None)
    assert store.set_of.tolist() == [-1] * 4
    assert store.check_integrity() == []


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
        self.device = Device(self.rng.randrange(1, 6), self.sink_tokens, rows=12)
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
            assert len(users) == self.device.store.capacity, "refused though a set was idle"

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
