"""lt_sglang.memory.host and host_sinks: what goes to host memory comes back as it was, whatever the shape."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lt_sglang.errors import LightTransferError
from lt_sglang.memory.host import HostMemory, HostPool
from lt_sglang.memory.host_sinks import HostSinks
from lt_sglang.memory.units import UnitShape
from tests.pools import Pools, make_pools

from .sink_rig import Device, request

SHAPES = [
    UnitShape(1, 1),
    UnitShape(2, 2),
    UnitShape(1, 3),
    UnitShape(3, 1),
    UnitShape(2, 3),
    UnitShape(4, 2),
]
DEVICE_UNITS, HOST_UNITS = 240, 300


class Tier:
    """Device pools and their host memory."""

    def __init__(self, shape: UnitShape, page: int, host_units: int = HOST_UNITS) -> None:
        self.page = page
        self.pools: Pools = make_pools(
            DEVICE_UNITS, 4, 4, requests=4, context=512, shape=shape, page_size=page
        )
        flat = self.pools.flat
        for part in flat.kv:
            part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(1)))
        self.memory = HostMemory(flat, host_units)
        self.flags = torch.rand(flat.layout.rows) < 0.5
        self.full = HostPool(self.memory, flat, range(shape.full_layers), "full", self.flags)
        self.streaming = HostPool(self.memory, flat, range(shape.full_layers, shape.layers), "streaming")

    def device(self, pool: HostPool) -> Any:
        """The device's allocator of the same kind."""
        allocator = self.pools.allocator
        return allocator.full_attn_allocator if pool is self.full else allocator.swa_attn_allocator

    def read(self, pool: HostPool, slots: torch.Tensor) -> list[torch.Tensor]:
        """K and V of device slots, layer by layer."""
        kv = self.pools.kv
        of = kv.full_kv_pool if pool is self.full else kv.swa_kv_pool
        flat = self.pools.flat
        found = []
        for layer, bank in enumerate(of.lt_banks):
            rows = flat.rows_of(bank, slots)
            found += [of.k_buffer[layer][rows].clone(), of.v_buffer[layer][rows].clone()]
        return found

    def back_up(self, pool: HostPool, slots: torch.Tensor) -> torch.Tensor:
        """As SGLang's controller does; the host slots."""
        host = pool.alloc(len(slots))
        assert host is not None
        rows = pool.prepare_transfer_indices(pool.moved_rows(host), slots, "kernel")
        pool.backup_from_device_all_layer(None, *rows, "kernel")
        return host

    def load(self, pool: HostPool, host: torch.Tensor, slots: torch.Tensor) -> None:
        """As SGLang's controller does, layer by layer."""
        rows = pool.prepare_transfer_indices(pool.moved_rows(host), slots, "kernel")
        for layer in range(pool.layer_num):
            pool.load_to_device_per_layer(None, *rows, layer, "kernel")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("page", [1, 16])
def test_what_comes_back_is_what_went(shape: UnitShape, page: int) -> None:
    """Both kinds side by side, to other slots than they came from; nobody else's rows change."""
    rng = random.Random(page)
    tier = Tier(shape, page)
    kept = []
    for pool in (tier.full, tier.streaming):
        device = tier.device(pool)
        for pages in (1, 3, 2):
            slots = device.alloc(pages * page)
            slots = slots[torch.tensor(rng.sample(range(len(slots)), len(slots)))] if page == 1 else slots
            kept.append((pool, slots, tier.read(pool, slots), tier.back_up(pool, slots)))
    flags = tier.flags.clone()
    for pool, slots, *_ in kept:
        tier.device(pool).free(slots)
    tier.flags.logical_not_()
    for part in tier.pools.flat.kv:
        part.zero_()
    came_back = []
    for pool, before, was, host in reversed(kept):
        slots = tier.device(pool).alloc(len(before))
        tier.load(pool, host, slots)
        came_back.append((pool, slots, was))
        if pool is tier.full:
            assert torch.equal(tier.flags[slots], flags[before])
    for pool, slots, was in came_back:
        assert all(torch.equal(a, b) for a, b in zip(tier.read(pool, slots), was, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kinds_share_host_memory(shape: UnitShape) -> None:
    """Either may have all of it; what one gives back the other can take."""
    tier = Tier(shape, 16)
    for pool, other in ((tier.full, tier.streaming), (tier.streaming, tier.full)):
        everything = pool.available_size()
        assert everything == HOST_UNITS // pool.parts * 16
        taken = pool.alloc(everything)
        assert taken is not None and len(set(taken.tolist())) == everything == pool.used
        assert other.available_size() < 16 * pool.parts and other.alloc(everything) is None
        assert pool.free(taken) == everything and pool.used == 0
        assert other.available_size() == HOST_UNITS // other.parts * 16


def test_bytes_of_a_token_and_of_all() -> None:
    tier = Tier(UnitShape(1, 3), 16)
    row = 2 * tier.memory.kv.k[0].numel() * tier.memory.kv.k.element_size()
    assert (tier.full.get_size_per_token(), tier.streaming.get_size_per_token()) == (row, 3 * row)
    assert sum(part.nbytes for part in tier.memory.kv) == (HOST_UNITS + 1) * tier.memory.unit_bytes


def test_more_host_memory_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lt_sglang.memory.host.host_memory_budget_bytes", lambda wanted: wanted - 1)
    with pytest.raises(LightTransferError, match=r"--hicache-size, --hicache-ratio: .* GB are free"):
        Tier(UnitShape(1, 1), 1)


def test_storage_is_refused() -> None:
    tier = Tier(UnitShape(1, 1), 16)
    for ask in (
        lambda: tier.full.get_data_page(0),
        tier.full.get_dummy_flat_data_page,
        lambda: tier.full.set_from_flat_data_page(0, torch.zeros(1)),
    ):
        with pytest.raises(LightTransferError, match="--hicache-storage-backend"):
            ask()


def host_sinks(tier: Tier, sets: int) -> HostSinks:
    return HostSinks(tier.memory, tier.streaming, sets, sink_tokens=3, slots_of_set=16)


def test_host_sets_are_kept_by_least_recent_use() -> None:
    tier = Tier(UnitShape(1, 3), 16)
    sinks = host_sinks(tier, 2)
    assert sinks.slots == 32 == tier.streaming.used and len(sinks) == 0
    first, second = sinks.keep("a"), sinks.keep("b")
    assert {first, second} == {0, 1} and sinks.keep("a") == first
    assert sinks.keep("c") == second and "b" not in sinks, "b was the longest unused"
    assert sinks.find("a") == first and sinks.keep("d") == second
    sinks.forget("d")
    sinks.forget("nobody")
    assert len(sinks) == 1 and sinks.keep("e") == second
    sinks.touch("a")
    sinks.touch("nobody")
    assert sinks.keep("f") == second
    tier.full.clear()
    tier.streaming.clear()
    sinks.clear()
    assert len(sinks) == 0 and tier.streaming.used == 32


@pytest.mark.parametrize("shape", [UnitShape(1, 1), UnitShape(1, 3)], ids=str)
def test_sinks_come_back(shape: UnitShape) -> None:
    """Two sets at once, in all of their units."""
    tier = Tier(shape, 16)
    sinks, device = host_sinks(tier, 3), tier.device(tier.streaming)
    slots = [device.alloc(16)[:3] for _ in range(2)]
    rows = [device.rows_in_parts(at) for at in slots]
    was = [tier.read(tier.streaming, at) for at in slots]
    sinks.back_up([sinks.keep("a"), sinks.keep("b")], rows)
    for part in tier.pools.flat.kv:
        part.zero_()
    sinks.restore([sinks.find("b"), sinks.find("a")], list(reversed(rows)))
    for at, expected in zip(slots, was, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tier.read(tier.streaming, at), expected, strict=True))


class FakeHost:
    """Host sets of whole numbers for the rig's buffer."""

    def __init__(self, device: Device, sets: int) -> None:
        self.device = device
        self.values = [torch.zeros(0)] * sets
        self.index_of: dict[object, int] = {}

    def __contains__(self, key: object) -> bool:
        return key in self.index_of

    def touch(self, key: object) -> None:
        """Nothing is driven out here."""

    def keep(self, key: object) -> int:
        return self.index_of.setdefault(key, len(self.index_of))

    def find(self, key: object) -> int:
        return self.index_of[key]

    def forget(self, key: object) -> None:
        self.index_of.pop(key, None)

    def clear(self) -> None:
        self.index_of.clear()

    def back_up(self, sets: list[int], rows: list[torch.Tensor]) -> None:
        for at, where in zip(sets, rows, strict=True):
            self.values[at] = self.device.buffer[where]

    def restore(self, sets: list[int], rows: list[torch.Tensor]) -> None:
        for at, where in zip(sets, rows, strict=True):
            self.device.buffer[where] = self.values[at]


def with_host(capacity: int) -> tuple[Device, FakeHost]:
    device = Device(capacity, sink_tokens=3)
    host = FakeHost(device, 8)
    device.store.host = host
    return device, host


def test_a_set_that_was_dropped_comes_back() -> None:
    device, host = with_host(capacity=1)
    one, two = request("a", row=1), request("b", row=2, first_slot=4)
    for value, each in ((100, one), (200, two)):
        device.write(each, value)
        assert device.capture(each)
        device.flush()
        device.store.release(each.name)
    assert ("a",) not in device.store and ("a",) in host
    assert not device.store.touch(("a",)) and device.store.on_host(("a",)) and device.store.restore(("a",))
    assert ("a",) in device.store and ("b",) not in device.store
    again = request("c", row=3, key="a")
    assert device.store.adopt("c", ("a",), again.where)
    device.flush()
    assert device.stored(3) == [100, 101, 102] and device.store.stats.restored == 1
    assert not device.store.check_integrity()


def test_nothing_comes_back_where_every_set_is_in_use() -> None:
    device, _ = with_host(capacity=1)
    one, two = request("a", row=1), request("b", row=2, first_slot=4)
    device.write(one, 100)
    assert device.capture(one)
    device.flush()
    device.store.release("a")
    device.write(two, 200)
    assert device.capture(two) and not device.store.restore(("a",))
    assert not device.store.restore(("nobody",)) and not device.store.on_host(("nobody",))


def test_a_copy_that_was_never_made_is_forgotten() -> None:
    """Its set is dropped before the flush, and its slots are somebody else's by then."""
    device, host = with_host(capacity=1)
    one, two = request("a", row=1), request("b", row=2, first_slot=4)
    device.write(one, 100)
    device.write(two, 200)
    assert device.capture(one)
    device.store.release("a")
    assert device.capture(two)
    device.flush()
    assert ("a",) not in host and ("b",) in host and device.stored(2) == [200, 201, 202]


def test_a_set_without_a_copy_gets_one_when_it_is_used_again() -> None:
    """Others took its place on the host."""
    device, host = with_host(capacity=2)
    one, two = request("a", row=1), request("b", row=2, key="a")
    device.write(one, 100)
    assert device.capture(one)
    device.flush()
    host.forget(("a",))
    assert device.store.adopt("b", ("a",), two.where)
    device.flush()
    assert ("a",) in host and host.values[host.find(("a",))][0].tolist() == [100, 101, 102]


def test_a_host_set_that_changed_hands_before_the_flush_gets_the_last_ones_sinks() -> None:
    """One set on the host, two captures: what the first one was to put there is not put there."""
    device, _ = with_host(capacity=2)

    class OneSet(FakeHost):
        def keep(self, key: object) -> int:
            self.index_of = {key: 0}
            return 0

    host = OneSet(device, 1)
    device.store.host = host
    one, two = request("a", row=1), request("b", row=2, first_slot=4)
    for value, each in ((100, one), (200, two)):
        device.write(each, value)
        assert device.capture(each)
    device.flush()
    assert ("a",) not in host and host.values[0][0].tolist() == [200, 201, 202]


def test_copies_alone_can_be_flushed() -> None:
    """HiCache is about to write the slots; where requests point follows with the next forward."""
    device, _ = with_host(capacity=2)
    one = request("a", row=5)
    device.write(one, 100)
    assert device.capture(one)

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        device.buffer[target] = device.buffer[source]

    device.store.flush_copies(copy)
    device.buffer[torch.tensor(one.slots)] = -1  # loaded
    assert device.stored(5) is None
    device.flush()
    assert device.stored(5) == [100, 101, 102]


def test_a_flush_of_the_cache_forgets_both_sides() -> None:
    device, host = with_host(capacity=2)
    one = request("a", row=1)
    device.write(one, 100)
    assert device.capture(one)
    device.flush()
    device.store.release("a")
    device.store.clear()
    assert ("a",) not in device.store and ("a",) not in host and not device.store.on_host(("a",))
