"""lt_sglang.memory.sinks: the store's order of events, by hand."""

from __future__ import annotations

import pytest
import torch

from lt_sglang.memory.sinks import SinkStore

from .sink_rig import Device, request


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
