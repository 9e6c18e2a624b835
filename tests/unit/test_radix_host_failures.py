"""Host memory that is full, and writes to it that fail: what is cached comes back right, or is a miss."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from lt_sglang.cache import host_stack
from lt_sglang.memory.host import HostMemory
from lt_sglang.memory.host_sinks import HostSinks
from lt_sglang.memory.units import UnitShape
from tests.pools import ONE_EACH

from .radix_rig import SINKS, WINDOW
from .test_radix_host import TOKENS
from .test_radix_host import Rig as HostRig

OTHER = list(range(300, 360))
TAGS = 1 << 21  # float32 has all whole numbers up to eight times that


class Rig(HostRig):
    """Requests whose K says which tokens it is of, one at a time; every hit is compared with that.

    fails: whether the next write to the host fails.
    """

    def __init__(self, units: int = 1200, ratio: float = 2.0, shape: UnitShape = ONE_EACH) -> None:
        super().__init__(units, ratio, shape)
        self.shape = shape
        assert self.cache.host is not None
        self.host = self.cache.host
        self.events: Counter[str] = Counter()
        self.fails: Callable[[], bool] = lambda: False
        write = self.cache.cache_controller.write

        def write_or_fail(*args: Any, **kwargs: Any) -> Any:
            if self.fails():
                self.events["failed"] += 1
                return None
            return write(*args, **kwargs)

        self.cache.cache_controller.write = write_or_fail

    def serve(self, tokens: list[int], outputs: int = 0, flush: bool = True) -> int:
        """A request from admission to end; how much of its prompt was a hit that it read.

        flush: whether a forward of others follows, with which its sinks are copied.
        """
        self.events["requests"] += 1
        req = self.request(f"r{self.events['requests']}", tokens)
        req.init_next_round_input(self.cache)
        on_host = req.host_hit_length or req.swa_host_hit_length
        assert self.cache.bring_sinks(req, lambda: self._held(req))
        if on_host:
            self._load(req)
        self.rows.alloc([req])
        req.lock = self.cache.lock(req.last_node)
        hit = int(req.prefix_len)
        if hit:
            prefix = self.cache.prefix_device_indices(req)
            self.rows.write((req.kv.req_pool_idx, slice(0, hit)), prefix.to(torch.int32))
            self.check_read(req, hit)
            self.events["from the host" if on_host else "hit"] += 1
        self.allocator.evict_to_free_tokens(self.cache, len(tokens) - hit)
        self._extend(req, None)
        self._compute(req, hit)
        checkpoint_kv_cache(req, self.cache)
        for token in range(outputs):
            self.cache.check_hicache_events()
            self.allocator.evict_to_free_tokens(self.cache, 1)
            self.allocator.promised = self.shape.units(1, 1)  # as check_decode_capacity
            self.decode(req, token)
            self._compute(req, req.kv.kv_committed_len - 1)
        self.finish(req)
        self.cache.check_hicache_events()
        self.cache.check_hicache_events()
        if flush:
            self.sinks.flush(self.flat.copy_rows)
        self.check()
        return hit

    def check(self) -> None:
        """As the other rig, and of host memory: every unit has one owner, and all are counted."""
        super().check()
        memory, told = self.host.memory, self.host.describe()
        streaming = told["streaming_slots_used"] + told["sink_sets"] * SINKS
        taken = self.shape.units(told["full_slots_used"], streaming)
        assert len(memory.units) == memory.units.size - taken
        free = memory.units.free.tolist()
        assert len(set(free)) == len(free) and told["sink_sets_used"] <= told["sink_sets"]
        assert not self.cache.ongoing_write_through and not self.cache.ongoing_load_back

    def empty(self) -> None:
        """Everything that is cached goes, on both sides; nothing may be left over."""
        self.drive_out()
        for kind in (ComponentType.FULL, ComponentType.SWA):
            self.cache.evict_host(1 << 20, kind)
        told = self.host.describe()
        assert (told["full_slots_used"], told["streaming_slots_used"]) == (0, 0)
        assert self.allocator.full_used == self.allocator.swa_attn_allocator.used == 0
        assert len(self.allocator.units) == self.allocator.units.size

    def check_read(self, req: Req, length: int) -> None:
        """Full layers have all of a prefix, lazy ones its window, and the sinks if they are asked for."""
        tags = tags_of(req.origin_input_ids.tolist()[:length])
        row = self._row(req, 0, length)
        self._compare(False, row, tags)
        self._compare(True, self.allocator.full_to_swa_index_mapping[row[-WINDOW:]], tags[-WINDOW:])
        if length > WINDOW:
            self._compare(True, self.sinks.slots_of[self.set_of(req)].to(torch.int64), tags[:SINKS])

    def _compare(self, lazy: bool, slots: torch.Tensor, tags: torch.Tensor) -> None:
        for bank, rows in self._rows(lazy, slots):
            found = self.flat.kv.k[rows, 0, 0]
            assert torch.equal(found, tags + bank * TAGS), f"bank {bank} reads another's rows"

    def _row(self, req: Req, start: int, end: int) -> torch.Tensor:
        return self.rows.req_to_token[req.kv.req_pool_idx, start:end].to(torch.int64)

    def _rows(self, lazy: bool, slots: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """Every bank of a kind, and where it has ``slots``."""
        banks = range(self.shape.full_layers, self.shape.layers) if lazy else range(self.shape.full_layers)
        return [(bank, self.flat.layout.bank_rows(bank, slots, self.flat.units.rest)) for bank in banks]

    @contextmanager
    def _held(self, req: Req) -> Iterator[None]:
        """As PrefillAdder._lock_node."""
        on_host = self.cache.inc_host_lock_ref(req.best_match_node).to_dec_params()
        lock = self.cache.lock(req.best_match_node)
        yield
        self.cache.unlock(lock)
        self.cache.dec_host_lock_ref(req.best_match_node, on_host)

    def _load(self, req: Req) -> None:
        """As UnitBudget.prepare_load_back and PrefillAdder.add_one_req; a load may not begin."""
        with self._held(req):
            units = self.shape.units(self.cache.tokens_to_load(req), req.swa_host_hit_length)
            self.allocator.make_spare(units, drop_sinks=True)
            loaded = self.cache.init_load_back(
                InitLoadBackParams(req.best_match_node, req.host_hit_length, req=req)
            )
        assert loaded is not None
        req.host_loaded_length, req.last_node = loaded
        req.prefix_len += req.host_loaded_length
        req.kv.cache_protected_len = req.prefix_len
        self.cache.ready_to_load_host_cache()

    def _compute(self, req: Req, start: int) -> None:
        """A forward: what is queued is done, and K of the tokens from ``start`` on is written."""
        self.sinks.flush(self.flat.copy_rows)
        self.allocator._settle()
        end = req.kv.kv_committed_len
        tags = tags_of([*req.origin_input_ids, *req.output_ids][:end])[start:]
        row = self._row(req, start, end)
        streaming = self.allocator.full_to_swa_index_mapping[row]
        for bank, rows in self._rows(False, row) + self._rows(True, streaming):
            self.flat.kv.k[rows, 0, 0] = tags + bank * TAGS


def tags_of(tokens: list[int]) -> torch.Tensor:
    """What K of each token holds, before a bank adds its own: of it and all before it, never 0."""
    tags, before = [], 0
    for token in tokens:
        before = crc32(f"{before},{token}".encode()) % (TAGS - 1) + 1
        tags.append(before)
    return torch.tensor(tags, dtype=torch.float32)


def fail_next(rig: Rig, *verdicts: bool) -> None:
    """The next writes fail or not, as said; later ones do not."""
    left = list(verdicts)
    rig.fails = lambda: bool(left) and left.pop(0)


def test_a_write_that_fails_loses_nothing() -> None:
    """The device has it all; once it is driven out there, it is a miss, and is written the next time."""
    rig = Rig()
    fail_next(rig, True)
    assert rig.serve(TOKENS) == 0 and rig.events["failed"] == 1
    told = rig.host.describe()
    assert told["full_slots_used"] == told["streaming_slots_used"] == 0 and told["sink_sets_used"] == 1
    assert rig.serve([*TOKENS, 1]) == len(TOKENS), "a hit on the device"
    rig.empty()
    fail_next(rig, True)
    rig.serve(TOKENS)
    rig.drive_out()
    assert rig.serve([*TOKENS, 1, 2]) == 0, "the sinks alone are on the host"
    rig.drive_out()
    assert rig.serve([*TOKENS, 1, 2, 3]) == len(TOKENS) + 2 and rig.events["from the host"] == 1
    rig.empty()


@pytest.mark.parametrize("failed", [0, 1, 2])
def test_a_turn_whose_write_fails(failed: int) -> None:
    """The turns before it come back as they were, or are a miss; those behind it are not read without it."""
    rig = Rig()
    fail_next(rig, *(turn == failed for turn in range(3)))
    turns = [TOKENS[:40], TOKENS, TOKENS + OTHER[:30]]
    for turn in turns:
        rig.serve(turn)
    assert rig.events["failed"] == 1
    rig.drive_out()
    hit = rig.serve([*turns[-1], 1])
    assert hit in (0, *map(len, turns)), hit
    rig.empty()


@pytest.mark.parametrize("kind", ["full", "streaming"])
def test_a_kind_that_finds_no_room_takes_the_other_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    monkeypatch.setattr(getattr(rig.host, kind), "alloc", lambda need: None)
    rig.serve(TOKENS)
    told = rig.host.describe()
    # Tokens that the window has left have full slots alone; of the others neither kind is taken.
    behind = len(TOKENS) - WINDOW - 1
    assert told["full_slots_used"] == {"full": 0, "streaming": behind}[kind]
    assert told["streaming_slots_used"] == 0
    monkeypatch.undo()
    rig.drive_out()
    assert rig.serve(TOKENS) == 0
    rig.drive_out()
    assert rig.serve([*TOKENS, 1]) == len(TOKENS)
    rig.empty()


def test_sinks_that_were_dropped_before_they_were_copied_are_a_miss() -> None:
    """Tokens and window are on the host; no forward came that would have copied the sinks."""
    rig = Rig()
    rig.serve(TOKENS, flush=False)
    rig.drive_out()
    told = rig.host.describe()
    assert told["full_slots_used"] == len(TOKENS) and told["sink_sets_used"] == 0
    assert rig.serve([*TOKENS, 1]) == 0
    rig.drive_out()
    assert rig.serve([*TOKENS, 1, 2]) == len(TOKENS) + 1
    rig.empty()


@pytest.mark.parametrize(("left", "of_full"), [(20, 0), (25, 0), (5, 45)])
def test_what_windows_do_not_give_full_layers_do(left: int, of_full: int) -> None:
    """left: slots there are once the windows went, of 20; each takes three units, a full one at least one."""
    asked: dict[ComponentType, int] = {}
    cache: Any = SimpleNamespace(evict_host=lambda tokens, kind: asked.update({kind: tokens}))
    pool: Any = SimpleNamespace(available_size=lambda: left, parts=3)
    host_stack._evict_streaming(cache, pool, 20)
    assert asked == {ComponentType.SWA: 20} | ({ComponentType.FULL: of_full} if of_full else {})


def test_a_copy_that_raises_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is swallowed: what was promised of host memory is not there."""

    def broken(*args: Any) -> None:
        raise RuntimeError("no such host memory")

    # SGLang waits for the stream before it raises; those of a CPU have nothing to wait for.
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda stream: None, raising=False)
    rig = Rig()
    monkeypatch.setattr(HostMemory, "back_up", broken)
    with pytest.raises(RuntimeError, match="no such host memory"):
        rig.serve(TOKENS[:WINDOW])  # has no sinks
    rig = Rig()
    monkeypatch.setattr(HostSinks, "back_up", broken)
    with pytest.raises(RuntimeError, match="no such host memory"):
        rig.serve(TOKENS)


def test_host_memory_that_is_full_holds_the_last_prompts() -> None:
    """The three kinds go together: a prefix is there with window and sinks, or not at all."""
    rig = Rig(units=300)
    prompts = [[number, *TOKENS] for number in range(12)]
    for prompt in prompts:
        assert rig.serve(prompt) == 0
    told = rig.host.describe()
    assert told["units_free"] < len(TOKENS) and told["full_slots_used"] < len(prompts) * len(TOKENS)
    rig.drive_out()
    hits = [rig.serve([*prompt, 1]) for prompt in reversed(prompts)]
    assert hits[0] == hits[1] == len(prompts[0]) and hits[-1] == 0
    assert set(hits) == {0, len(prompts[0])}
    rig.empty()


@pytest.mark.parametrize("shape", [ONE_EACH, UnitShape(1, 2), UnitShape(2, 3)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.15])
def test_any_order_over_full_host_memory(
    share: float, shape: UnitShape, record_property: pytest.RecordProperty
) -> None:
    """share: of writes that fail. Every hit has the K of its tokens, in full layers, window and sinks."""
    first = random.randrange(1 << 30)
    record_property("seed", first)
    events = Counter[str]()
    for seed in range(first, first + 4):
        events += any_order(seed, share, shape)
    assert events["hit"] > 10 and events["from the host"] > 5 and events["full"] > 5, events
    assert bool(events["failed"]) == bool(share)


def any_order(seed: int, share: float, shape: UnitShape) -> Counter[str]:
    """Prompts that begin alike, and turns that go on, over little memory; what happened."""
    rng = random.Random(seed)
    rig = Rig(130 * shape.units(1, 1), rng.choice([0.7, 1.0, 1.5]), shape)
    rig.fails = lambda: rng.random() < share
    streaming = rig.host.streaming
    alloc = streaming.alloc
    streaming.alloc = lambda need: None if rng.random() < share / 2 else alloc(need)  # type: ignore[method-assign]
    prompts: list[list[int]] = []
    for _ in range(60):
        one = rng.choice(prompts) if prompts and rng.random() < 0.6 else [rng.randrange(4)]
        beginning = one[: rng.choice([len(one), len(one), len(one) // 2])]
        prompt = [*beginning, *(rng.randrange(900) for _ in range(rng.choice([1, 5, 15, 45])))][:90]
        rig.serve(prompt, outputs=rng.choice([0, 0, 3, 25]), flush=rng.random() < 0.8)
        rig.events["full"] += len(rig.host.memory.units) < shape.units(WINDOW, WINDOW)
        prompts = [*prompts[-20:], prompt]
        if rng.random() < 0.15:
            rig.drive_out()
    rig.empty()
    return rig.events
