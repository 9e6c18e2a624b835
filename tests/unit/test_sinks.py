"""lt_sglang.memory.sinks: the store's order of events, by hand and by seeded churn against a simple model."""

from __future__ import annotations

import pytest
import torch

from lt_sglang.memory.sinks import SinkStore

from .sink_rig import OTHERS, Device, Source, request


def test_the_tables_are_where_and_what_they_are_said_to_be() -> None:
    store = SinkStore(2, 3, 16, "meta", Source(6))
    for table, shape in ((store.set_of, (16,)), (store.slots_of, (2, 3))):
        assert (tuple(table.shape), table.dtype, table.device.type) == (shape, torch.int32, "meta")


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
    device.write(request("a", 5), 7)
    device.store.capture("a", ("a",), lambda: 5, lambda: slots)
    device.flush()
    assert ("stream of", slots.device) in seen and device.stored(5) == [7, 8, 9]


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
    store = SinkStore(0, 0, 4, "cpu", Source(0))
    assert store.capture("a", (), lambda: 1, lambda: torch.empty(0, dtype=torch.int64))
    assert store.adopt("a", (), lambda: 1)
    assert store.holds("a") and store.touch(())
    store.release("a")
    store.flush(lambda target, source: None)
    assert store.set_of.tolist() == [-1] * 4
    assert store.check_integrity() == []


def test_a_set_takes_slots_as_it_is_filled_and_gives_them_back() -> None:
    device = Device(4, 3, slots=6)
    source, store = device.source, device.store
    assert len(source.free) == 6, "none is set aside"
    assert device.capture(request("a", 1)) and device.capture(request("b", 2, first_slot=5))
    assert source.free == []
    assert not device.capture(request("c", 3, first_slot=9)), "indices are left, slots are not"
    store.release("a")
    assert device.capture(request("c", 3, first_slot=9))
    assert (store.stats.evicted, store.used, source.free) == (1, 2, [])
    store.release("b")
    store.release("c")
    store.clear()
    assert sorted(source.free) == source.all


def test_trim_drops_the_longest_unused_down_to_what_is_to_be_kept() -> None:
    device = Device(5, 3)
    for number, name in enumerate("abcd"):
        device.capture(request(name, number + 1, first_slot=3 * number + 1))
    for name in "bda":
        device.store.release(name)
    assert (device.store.used, device.store.in_use, device.store.unused) == (4, 1, 3)
    # Least recently used first is the order of capture; "c" is in use.
    device.store.trim(keep=2)
    assert ("a",) not in device.store and ("b",) in device.store and device.store.stats.evicted == 1
    device.store.trim(keep=0, until=lambda: True)
    assert device.store.unused == 2, "there is enough already"
    dropped = [len(device.source.free)]
    device.store.trim(keep=0, until=lambda: len(device.source.free) > dropped[0])
    assert device.store.unused == 1
    device.store.trim(keep=5)
    device.store.trim(keep=0)
    assert device.store.used == device.store.in_use == 1 and ("c",) in device.store
    assert device.store.check_integrity() == []


def test_a_set_is_whole_pages() -> None:
    source = Source(32, page_size=4)
    store = SinkStore(3, 6, 8, "cpu", source)
    assert store.slots_of_set == 8
    assert store.capture("a", ("a",), lambda: 1, lambda: torch.arange(1, 7))
    assert len(source.free) == 6
    copied: list[tuple[list[int], list[int]]] = []
    store.flush(lambda target, given: copied.append((target.tolist(), given.tolist())))
    (target, given), first = copied[0], source.all[0]
    slots = list(range(first, first + 6))
    assert target == slots + [slot + OTHERS for slot in slots], "only so many rows as there are sinks"
    assert given == [*range(1, 7), *(slot + OTHERS for slot in range(1, 7))]
    assert store.slots_of[int(store.set_of[1])].tolist() == slots
    store.release("a")
    store.clear()
    assert sorted(source.free) == source.all


def test_rows_are_found_before_another_owns_the_slots() -> None:
    """A slot's other rows change as soon as its units are taken anew, which may be before the flush."""
    device = Device(2, 3)
    one = request("a", 5)
    device.write(one, 100)
    assert device.capture(one)
    device.source.rows_in_parts = lambda slots: torch.stack([slots, slots * 0])  # type: ignore[method-assign]
    moved = Source.rows_in_parts
    device.flush()
    device.source.rows_in_parts = lambda slots: moved(device.source, slots)  # type: ignore[method-assign]
    assert device.stored(5) == [100, 101, 102]
