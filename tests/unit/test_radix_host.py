"""lt_sglang.cache with HiCache, no server: hits of both sides, loads, and what goes wrong in between."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InitLoadBackParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.server_args import ServerArgs

from lt_sglang.cache.radix_dynamic import NOWHERE, DynamicRadixCache
from lt_sglang.cache.radix_static import LightTransferRadixCache, hit_length, longest_hit
from lt_sglang.memory.host import NO_STORAGE
from lt_sglang.memory.units import UnitShape
from tests.pools import ONE_EACH, make_pools

from .radix_rig import SINKS, WINDOW
from .radix_rig import Rig as PlainRig

TOKENS = list(range(100, 160))


class Rig(PlainRig):
    """The rig's cache with HiCache; ``flushed``: how many loads waited, each time copies were asked for."""

    def __init__(self, units: int = 1200, ratio: float = 2.0, shape: UnitShape = ONE_EACH) -> None:
        hicache: dict[str, Any] = {"enable_hierarchical_cache": True, "hicache_ratio": ratio}
        pools = make_pools(
            units, 6, SINKS, requests=10, context=512, shape=shape, window=WINDOW + 1, **hicache
        )
        self.rows, self.allocator, self.sinks = pools.rows, pools.allocator, pools.sinks
        self.flat = pools.flat
        for part in self.flat.kv:
            part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(2)))
        params = pools.cache_params(WINDOW)
        self.cache = LightTransferRadixCache(params, self.sinks)
        self.cache.init_hicache(ServerArgs(model_path="dummy", device="cpu"), params)
        self.flushed: list[int] = []
        self.cache.flush_sinks = self.flush_copies

    def flush_copies(self) -> None:
        """As the model runner."""
        self.flushed.append(len(self.cache.cache_controller.load_queue))
        self.sinks.flush_copies(self.flat.copy_rows)

    def cached(self, tokens: list[int]) -> list[torch.Tensor]:
        """A prompt is computed, ends, and is copied to the host; what ``read`` found of it."""
        req = self.prefilled(self.request("writer", tokens))
        self.sinks.flush(self.flat.copy_rows)
        was = self.read(req, len(tokens))
        self.finish(req)
        self.cache.check_hicache_events()
        self.cache.check_hicache_events()
        return was

    def read(self, req: Req, tokens: int) -> list[torch.Tensor]:
        """K of ``tokens`` in full layers, and of the last window of them in lazy ones."""
        row = self.rows.req_to_token[req.kv.req_pool_idx, :tokens].to(torch.int64)
        window = self.allocator.full_to_swa_index_mapping[row[-WINDOW:]]
        kv = self.allocator.get_kvcache()
        return [kv.full_kv_pool.k_buffer[0][row].clone(), kv.swa_kv_pool.k_buffer[0][window].clone()]

    def drive_out(self) -> None:
        """Nothing of what is cached stays on the device."""
        self.cache.evict(EvictParams(num_tokens=10_000, swa_num_tokens=10_000))
        self.sinks.trim(keep=0)
        for part in self.flat.kv:
            part.zero_()

    def admit_with_load(self, req: Req) -> tuple[int, Any]:
        """As PrefillAdder.add_one_req and the scheduler."""
        assert self.cache.bring_sinks(req, nullcontext)
        params = InitLoadBackParams(req.best_match_node, req.host_hit_length, req=req)
        loaded = self.cache.init_load_back(params)
        assert loaded is not None
        req.host_loaded_length, req.last_node = loaded
        req.prefix_len += req.host_loaded_length
        self.cache.ready_to_load_host_cache()
        return loaded


def test_a_prefix_that_was_driven_out_comes_back() -> None:
    rig = Rig()
    was = rig.cached(TOKENS)
    rig.drive_out()
    assert rig.allocator.full_used == rig.allocator.swa_attn_allocator.used == 0
    req = rig.request("reader", [*TOKENS, 1, 2, 3])
    req.init_next_round_input(rig.cache)
    assert (req.prefix_len, req.host_hit_length) == (0, len(TOKENS)) and req.swa_host_hit_length >= WINDOW
    rig.admit_with_load(req)
    assert req.prefix_len == len(TOKENS) and rig.flushed == [1]
    rig.rows.alloc([req])
    req.lock = rig.cache.lock(req.last_node)
    prefix = rig.cache.prefix_device_indices(req)
    rig.rows.write((req.kv.req_pool_idx, slice(0, req.prefix_len)), prefix.to(torch.int32))
    found = rig.read(req, len(TOKENS))
    assert torch.equal(found[0], was[0]) and torch.equal(found[1], was[1])
    assert rig.set_of(req) >= 0 and rig.sinks.stats.restored == 1
    slots = rig.sinks.slots_of[rig.set_of(req)].to(torch.int64)
    assert rig.allocator.get_kvcache().swa_kv_pool.k_buffer[0][slots].abs().min() > 0
    rig.check()


def test_sinks_alone_come_back() -> None:
    """Of a prefix that stayed on the device."""
    rig = Rig()
    rig.cached(TOKENS)
    rig.sinks.trim(keep=0)
    req = rig.admit(rig.request("reader", [*TOKENS, 1]))
    assert req.prefix_len == len(TOKENS) and req.host_hit_length == 0 and rig.sinks.stats.restored == 1
    assert rig.set_of(req) >= 0


def test_a_match_evicts_nothing() -> None:
    """Nobody holds a prefix that was matched yet: its sinks are brought when it is."""
    rig = Rig()
    rig.cached(TOKENS)
    rig.sinks.trim(keep=0)
    streaming = rig.allocator.swa_attn_allocator
    taken = streaming.alloc(streaming.available_size())
    req = rig.request("reader", [*TOKENS, 1])
    req.init_next_round_input(rig.cache)
    assert req.prefix_len == len(TOKENS) and rig.sinks.used == 0
    lock = rig.cache.lock(req.last_node)
    assert not rig.cache.bring_sinks(req, nullcontext), "no slot, and what the request reads is not given up"
    streaming.free(taken)
    held: list[str] = []

    @contextmanager
    def hold() -> Iterator[None]:
        held.append("held")
        yield

    assert rig.cache.bring_sinks(req, hold) and held == ["held"]
    assert rig.cache.bring_sinks(req, hold) and held == ["held"], "they are there"
    rig.sinks.trim(keep=0)
    assert rig.sinks.used == 1, "promised until the batch is formed"
    rig.allocator._settle()
    rig.sinks.trim(keep=0)
    assert rig.sinks.used == 0
    rig.cache.unlock(lock)


def test_a_window_alone_is_loaded_and_reckoned_as_such() -> None:
    """SGLang counts tokens of full layers on the host, also where the device has them."""
    rig = Rig()
    rig.cached(TOKENS)
    rig.cache.evict(EvictParams(num_tokens=0, swa_num_tokens=10_000))
    req = rig.request("reader", [*TOKENS, 1])
    req.init_next_round_input(rig.cache)
    assert (req.prefix_len, req.host_hit_length) == (0, len(TOKENS)) and req.swa_host_hit_length >= WINDOW
    here = rig.allocator.full_used
    assert 0 < here < len(TOKENS) and rig.cache.tokens_to_load(req) == len(TOKENS) - here
    assert rig.admit_with_load(req)[0] == len(TOKENS) == req.prefix_len
    assert rig.allocator.full_used == len(TOKENS)


def test_a_load_may_show_more_than_was_hit() -> None:
    """The sinks of all of it are asked for: full layers on the device behind a window on the host."""

    def result(**lengths: int) -> Any:
        return MatchResult(lengths.pop("device", 0), None, None, None, **lengths)

    assert longest_hit(result(device=5, host_hit_length=7, full_kv_hit_length=60)) == 12
    assert longest_hit(result(device=5, swa_host_hit_length=20, full_kv_hit_length=60)) == 60


def test_unused_sinks_go_for_a_load() -> None:
    """Admission counts them, so a load must be able to have their slots."""
    rig = Rig()
    rig.cached(TOKENS)
    rig.drive_out()
    assert rig.sinks.restore(next(iter(rig.sinks.host._index_of)))  # type: ignore[union-attr]
    allocator = rig.allocator
    everything = len(allocator.units) + allocator.evictable_units(rig.cache)
    assert everything > len(allocator.units) and not allocator.make_spare(everything)
    assert allocator.make_spare(everything, drop_sinks=True) and rig.sinks.used == 0


def test_flags_of_a_load_that_has_not_begun_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Any = object.__new__(DynamicRadixCache)
    cache.ongoing_load_back = {1: "load"}
    cache.cache_controller = SimpleNamespace(load_queue=["load"])
    had: Any = SimpleNamespace(default=False, full_rows=3)
    assert not cache._rows_unchanged(had, None)


def test_a_hit_without_sinks_on_either_side_is_a_miss() -> None:
    rig = Rig()
    rig.cached(TOKENS)
    rig.drive_out()
    host: Any = rig.sinks.host
    for key in list(host._index_of):
        host.forget(key)
    req = rig.request("reader", [*TOKENS, 1])
    req.init_next_round_input(rig.cache)
    assert (req.prefix_len, req.host_hit_length) == (0, 0)


def test_a_flush_empties_host_memory() -> None:
    rig = Rig()
    rig.cached(TOKENS)
    assert rig.cache.host is not None
    before = rig.cache.host.describe()
    assert before["full_slots_used"] >= len(TOKENS) and before["sink_sets_used"] == 1
    held = rig.cache.host.bytes_by_kind()
    assert held["full"] and held["streaming"] and held["sink"]
    assert sum(held.values()) == before["units"] * before["unit_bytes"]
    rig.cache.reset()
    told = rig.cache.host.describe()
    assert told["full_slots_used"] == told["streaming_slots_used"] == told["sink_sets_used"] == 0
    assert set(rig.cache.host.bytes_by_kind().values()) == {0, before["units"] * before["unit_bytes"]}
    req = rig.request("reader", [*TOKENS, 1])
    req.init_next_round_input(rig.cache)
    assert (req.prefix_len, req.host_hit_length) == (0, 0)


def test_no_load_no_copies_beforehand() -> None:
    rig = Rig()
    rig.cached(TOKENS)
    rig.cache.ready_to_load_host_cache()
    assert rig.flushed == []


def test_copies_can_be_waited_for() -> None:
    """As a change of weights does, before the cache is flushed."""
    rig = Rig()
    req = rig.prefilled(rig.request("writer", TOKENS))
    rig.finish(req)
    assert rig.cache.ongoing_write_through
    rig.cache.finish_copies()
    assert not rig.cache.ongoing_write_through and not rig.cache.ongoing_load_back
    plain = PlainRig()
    plain.cache.finish_copies()  # without HiCache there are none


def test_storage_is_refused_while_the_server_runs() -> None:
    assert Rig().cache.attach_storage_backend("file") == (False, NO_STORAGE)


@pytest.mark.parametrize("driven_out", [False, True])
def test_a_hit_is_as_long_on_either_side(driven_out: bool) -> None:
    rig = Rig()
    rig.cached(TOKENS)
    if driven_out:
        rig.drive_out()
    found = rig.cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", TOKENS))))
    assert hit_length(found) == len(TOKENS) and bool(found.host_hit_length) == driven_out


def test_in_dynamic_mode_a_prefix_is_loaded_whole_or_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on the device may be less than the first block, which its layers were selected over."""
    answers: list[tuple[int, str] | None] = [(0, "device"), (30, "loaded"), None]
    monkeypatch.setattr(LightTransferRadixCache, "init_load_back", lambda self, params: answers.pop(0))
    cache: Any = object.__new__(DynamicRadixCache)
    monkeypatch.setattr(DynamicRadixCache, "root_node_handle", lambda self, key: ("root", key))

    def ask() -> tuple[Any, Any]:
        req: Any = SimpleNamespace(prefix_len=20, kv=SimpleNamespace(cache_protected_len=20))
        req.lighttransfer_hit = "set", "prompt"
        return req, cache.init_load_back(InitLoadBackParams("node", 30, req=req))

    req, loaded = ask()
    assert loaded == (0, ("root", NOWHERE)) and req.lighttransfer_hit == (None, None)
    assert req.prefix_len == req.kv.cache_protected_len == 0
    for expected in ((30, "loaded"), None):
        req, loaded = ask()
        assert loaded == expected and (req.prefix_len, req.lighttransfer_hit) == (20, ("set", "prompt"))
