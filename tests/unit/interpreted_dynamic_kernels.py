"""Kernels of dynamic mode under Triton's interpreter, against plain loops; test_kernels.py runs this."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from lt_sglang.attention.indices import StreamingTables, Windows, decode_kv_indices_reference
from lt_sglang.attention.kernels import decode_dynamic
from lt_sglang.attention.kernels.banks import LayerBanks
from lt_sglang.attention.kernels.extend_dynamic import every_kv_indices, extend_kv_indices, extend_kv_indptr
from lt_sglang.attention.kernels.merge_sinks import BankColumn, Scales, Sinks, make_sink_tiles, merge_sinks
from lt_sglang.attention.kernels.place import exchange, store_new
from lt_sglang.attention.kernels.requests import Requests
from lt_sglang.attention.kernels.store import store_kv
from lt_sglang.attention.kernels.tiles import make_tiles
from lt_sglang.identify.queue import queue_step
from lt_sglang.identify.queue_kernel import queue_step as queue_step_kernel
from lt_sglang.layers.layer_sets import banks as banks_of
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.banks import BankLayout
from lt_sglang.memory.kv import KV
from lt_sglang.memory.units import UnitList, UnitShape

LAYERS, KEEP = 7, 3
SINK, RECENT = 4, 12
UNITS, SETS = 2000, 5
WINDOWS = Windows(SINK, RECENT)
LAYOUT = BankLayout(UnitShape(KEEP, LAYERS - KEEP), UNITS + 1)


@pytest.fixture(params=[(7, 3), (6, 3), (8, 6)], ids=["parts-3-4", "one-part", "parts-3-1"], autouse=True)
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with tokens of one and of several units."""
    number, keep = request.param
    monkeypatch.setitem(globals(), "LAYERS", number)
    monkeypatch.setitem(globals(), "KEEP", keep)
    shape = UnitShape(keep, number - keep)
    monkeypatch.setitem(globals(), "LAYOUT", BankLayout(shape, UNITS + 1))


def test_kernels_are_interpreted_here() -> None:
    assert type(decode_dynamic._decode_kv_indices).__name__ == "InterpretedFunction"


class World:
    """Requests of given lengths with random slots, sink sets and layer sets."""

    def __init__(self, rng: random.Random, lengths: list[int]) -> None:
        self.lengths = lengths
        count, shape = len(lengths), LAYOUT.shape
        self.rows = torch.tensor(rng.sample(range(1, 20), count), dtype=torch.int64)
        self.units = UnitList(UNITS, 1, shape.parts, "cpu")
        self.units.free = torch.tensor(rng.sample(range(1, UNITS + 1), UNITS))
        self.req_to_token = torch.zeros((20, 256), dtype=torch.int32)
        self.full_to_streaming = torch.zeros(UNITS + 2, dtype=torch.int64)
        self.sink_set_of = torch.full((20,), -1, dtype=torch.int32)
        self.sink_slots_of = self.units.take(SETS * SINK, shape.streaming_units).view(SETS, SINK).int()
        for index, (row, length) in enumerate(zip(self.rows.tolist(), lengths, strict=True)):
            taken = self.units.take(length, shape.full_units)
            self.req_to_token[row, :length] = taken.to(torch.int32)
            if index < SETS and rng.random() < 0.7:
                self.sink_set_of[row] = index
            for position, slot in enumerate(taken.tolist()):
                sink = position < SINK and self.sink_set_of[row] < 0
                if sink or position >= length - RECENT - 3:
                    self.full_to_streaming[slot] = self.units.take(1, shape.streaming_units)
        self.bank_of = torch.full((12, LAYERS), -1, dtype=torch.int32)
        self.set_of = torch.zeros(20, dtype=torch.int32)
        sets = rng.sample(range(12), count)
        for row, chosen in zip(self.rows.tolist(), sets, strict=True):
            lazy = sorted(rng.sample(range(LAYERS), LAYERS - KEEP))
            table = banks_of(lazy, LAYERS)
            self.bank_of[chosen] = torch.tensor(table, dtype=torch.int32)
            self.set_of[row] = chosen
        self.tables = StreamingTables(
            self.req_to_token, self.full_to_streaming, self.sink_set_of, self.sink_slots_of
        )
        self.banks = LayerBanks(self.bank_of, self.set_of, LAYOUT, self.units.rest, WINDOWS)

    def row(self, bank: int, slot: int) -> int:
        """Where a slot is in a bank."""
        return int(LAYOUT.bank_rows(bank, torch.tensor([slot]), self.units.rest))

    def keep_windows(self, index: int) -> None:
        """Give every token of a request a streaming slot, as before its layers are known."""
        for slot in self.full(index):
            if not self.full_to_streaming[slot]:
                self.full_to_streaming[slot] = self.units.take(1, LAYOUT.shape.streaming_units)

    def full(self, index: int) -> list[int]:
        return self.req_to_token[self.rows[index], : self.lengths[index]].tolist()

    def bank(self, index: int, layer: int) -> int:
        return int(self.bank_of[self.set_of[self.rows[index]], layer])

    def streaming(self, index: int) -> list[int]:
        return [int(self.full_to_streaming[slot]) for slot in self.full(index)]


@pytest.mark.parametrize("seed", range(4))
def test_decode_kv_indices(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng, [1, rng.randint(2, 15), 16, 17, rng.randint(18, 90), 40])
    lengths = torch.tensor(world.lengths)
    count = len(lengths)
    pointers = torch.full((LAYERS * count + 1,), -9, dtype=torch.int32)
    decode_dynamic.decode_kv_indptr(pointers, world.banks, world.rows, lengths)
    out = torch.full((int(pointers[-1]) + 5,), -9, dtype=torch.int32)
    decode_dynamic.decode_kv_indices(
        out, pointers, world.banks, world.tables, world.rows, lengths, longest=90
    )
    short = decode_kv_indices_reference(world.rows, lengths, world.tables, WINDOWS).to(torch.int64)
    lazy = short.split(lengths.clamp(max=SINK + RECENT).tolist())
    at = 0
    for layer in range(LAYERS):
        for index in range(count):
            bank = world.bank(index, layer)
            rows = world.full(index) if bank < KEEP else lazy[index].tolist()
            expected = [world.row(bank, slot) for slot in rows]
            assert int(pointers[layer * count + index]) == at
            assert out[at : at + len(rows)].tolist() == expected, (layer, index)
            at += len(rows)
    assert int(pointers[-1]) == at
    assert (out[at:] == -9).all()


def test_out_cache_loc_and_store() -> None:
    rng = random.Random(7)
    world = World(rng, [5, 30, 1])
    # Of a padded batch SGLang gives the real requests' slots alone, cut from a longer list of free ones.
    full = torch.tensor([world.full(i)[-1] for i in range(3)] + [99, 98])[:3]
    streaming = torch.tensor([world.streaming(i)[-1] for i in range(3)] + [97, 96])
    rows = torch.cat([world.rows, torch.tensor([0])])
    world.bank_of[0] = torch.tensor(banks_of(list(range(LAYERS - KEEP)), LAYERS), dtype=torch.int32)
    out = torch.full((LAYERS, 6), -9, dtype=torch.int32)
    decode_dynamic.decode_out_cache_loc(out, world.banks, rows, full, streaming)
    for layer in range(LAYERS):
        for index in range(4):
            bank = int(world.bank_of[world.set_of[rows[index]], layer])
            slot = 0 if index == 3 else int(full[index] if bank < KEEP else streaming[index])
            assert int(out[layer, index]) == world.row(bank, slot)
    assert (out[:, 4:] == -9).all()
    keys, values = torch.zeros(50, 2, 3), torch.zeros(50, 2, 3)
    wide = torch.randn(4, 20)
    k, v = wide[:, 2:8].view(4, 2, 3), wide[:, 9:15].view(4, 2, 3)
    where = torch.tensor([7, 3, 49, 0], dtype=torch.int32)
    store_kv(KV(keys, values), where, KV(k, v))
    assert torch.equal(keys[where.long()], k) and torch.equal(values[where.long()], v)
    assert int((keys != 0).any(2).any(1).sum()) == 4


def test_queue_step_equals_torch() -> None:
    rng = random.Random(3)
    for _ in range(30):
        ours, theirs = (torch.full((9, LAYERS), -1, dtype=torch.int32) for _ in range(2))
        a, b = torch.zeros(9, LAYERS), torch.zeros(9, LAYERS)
        sets = torch.tensor(rng.sample(range(9), 4))
        popped = torch.zeros(6, dtype=torch.int32)
        for layer in range(LAYERS):
            values = [0.1, 0.2, 0.3, float("nan"), float("-inf")]
            score = torch.tensor([rng.choice(values) for _ in range(4)])
            queue_step_kernel(ours, a, sets.to(torch.int32), score, popped, layer, KEEP)
            b[sets, layer] = score
            expected = queue_step(theirs, b, sets, layer, KEEP)
            assert popped[:4].tolist() == expected.tolist()
            assert torch.equal(ours, theirs)
        for chosen in sets.tolist():
            assert sorted(ours[chosen].tolist()) == list(range(LAYERS)), "every bank has one owner"


@dataclass
class Chunk:
    """A prefill batch over a world; the facts the kernels get."""

    world: World
    plans: list[Prefill]

    def requests(self) -> Requests:
        facts: list[list[int]] = []
        token = offset = deciding = 0
        for plan in self.plans:
            number = deciding if plan.kind == Kind.SELECT else -1
            facts.append([int(plan.kind), plan.layer_set, plan.prefix, token, offset, number])
            token, offset, deciding = token + plan.extend, offset + plan.end, deciding + (number >= 0)
        table = torch.tensor(facts, dtype=torch.int32).t().contiguous()
        full = [slot for index in range(len(self.plans)) for slot in self.world.full(index)]
        streaming = [slot for index in range(len(self.plans)) for slot in self.world.streaming(index)]
        sets = self.world.sink_set_of[self.world.rows].long()
        sinks = torch.where(sets[:, None] >= 0, self.world.sink_slots_of[sets], -1).int()
        slots = (torch.tensor(full, dtype=torch.int32), torch.tensor(streaming, dtype=torch.int32))
        return Requests(*table[:5], sinks, table[5], *slots)


def chunk(seed: int, short: bool) -> Chunk:
    rng = random.Random(seed)
    shapes = [(0, 30), (20, 45), (33, 50), (10, 26), (0, 9)]
    kinds = [Kind.SELECT, Kind.SELECT, Kind.STAGED, Kind.KNOWN, Kind.KNOWN]
    if short:  # decided requests that have not left their windows
        shapes[3] = (9, 15)
    world = World(rng, [end for _, end in shapes])
    plans = []
    for index, ((prefix, end), kind) in enumerate(zip(shapes, kinds, strict=True)):
        row = int(world.rows[index])
        plans.append(Prefill(kind, row, int(world.set_of[row]), prefix, end - prefix))
        if kind != Kind.KNOWN:
            world.keep_windows(index)
    return Chunk(world, plans)


def expected_row(case: Chunk, index: int, layer: int, position: int) -> int:
    """Where a position is: until a request's layers are known, each is in the bank of its number."""
    plan, world = case.plans[index], case.world
    bank = world.bank(index, layer) if plan.kind == Kind.KNOWN else layer
    slot = world.full(index)[position] if bank < KEEP else world.streaming(index)[position]
    return world.row(bank, slot)


@pytest.mark.parametrize("seed", range(3))
def test_extend_kv_indices(seed: int) -> None:
    case = chunk(seed, short=False)
    given, count = case.requests(), len(case.plans)
    ends = [plan.end for plan in case.plans]
    firsts = [max(plan.prefix - RECENT + 1, 0) for plan in case.plans]
    for lazy, begin in ((False, [0] * count), (True, firsts)):
        lengths = [end - first for first, end in zip(begin, ends, strict=True)]
        sizes = torch.tensor(lengths, dtype=torch.int32)
        pointers = extend_kv_indptr(case.world.banks, given, sizes, lazy=lazy)
        out = extend_kv_indices(case.world.banks, given, begin, ends, pointers, lazy=lazy)
        at = 0
        for layer in range(LAYERS):
            for index, plan in enumerate(case.plans):
                full = plan.kind != Kind.KNOWN or case.world.bank(index, layer) < KEEP
                positions = range(begin[index], ends[index]) if full != lazy else range(0)
                expected = [expected_row(case, index, layer, p) for p in positions]
                assert int(pointers[layer * count + index]) == at
                assert out[at : at + len(expected)].tolist() == expected, (lazy, layer, index)
                at += len(expected)
        assert int(pointers[-1]) == at


@pytest.mark.parametrize("seed", range(3))
def test_prefix_lists(seed: int) -> None:
    case = chunk(seed, short=True)
    given, count = case.requests(), len(case.plans)
    prefixes = [plan.prefix for plan in case.plans]
    out = every_kv_indices(case.world.banks, given, [0] * count, prefixes)
    for layer in range(LAYERS):
        at = 0
        for index, plan in enumerate(case.plans):
            rows = [expected_row(case, index, layer, p) for p in range(plan.prefix)]
            assert out[layer, at : at + len(rows)].tolist() == rows, (layer, index)
            at += len(rows)
        assert out.shape == (LAYERS, at)


@pytest.mark.parametrize("seed", range(3))
def test_lists_of_every_layer_from_somewhere_on(seed: int) -> None:
    """Cached and new tokens."""
    case = chunk(seed, short=False)
    given, ends = case.requests(), [plan.end for plan in case.plans]
    firsts = [max(plan.prefix - RECENT + 1, 0) for plan in case.plans]
    out = every_kv_indices(case.world.banks, given, firsts, ends)
    for layer in range(LAYERS):
        at = 0
        for index, first in enumerate(firsts):
            rows = [expected_row(case, index, layer, p) for p in range(first, ends[index])]
            assert out[layer, at : at + len(rows)].tolist() == rows, (layer, index)
            at += len(rows)


def test_prefix_lists_read_sinks_that_left_the_window() -> None:
    world = World(random.Random(5), [SINK + RECENT])
    row = int(world.rows[0])
    world.sink_set_of[row] = 2
    plan = Prefill(Kind.KNOWN, row, int(world.set_of[row]), SINK + RECENT - 1, 1)
    case = Chunk(world, [plan])
    out = every_kv_indices(world.banks, case.requests(), [0], [plan.prefix])
    left = plan.prefix - RECENT
    for layer in range(LAYERS):
        bank = world.bank(0, layer)
        if bank >= KEEP:
            sinks = world.sink_slots_of[2, :left].tolist()
            assert out[layer, :left].tolist() == [world.row(bank, slot) for slot in sinks]


@pytest.mark.parametrize("seed", range(3))
def test_store_and_exchange(seed: int) -> None:
    """Two requests are selected for, one is staged, two were decided before; every layer in turn."""
    case = chunk(seed, short=False)
    world, plans, given = case.world, case.plans, case.requests()
    rng = random.Random(seed + 100)
    pool = KV(*(torch.randn(LAYOUT.total_rows, 2, 3) for _ in range(2)))
    tokens = sum(plan.extend for plan in plans)
    new = make_tiles([(i, plan.prefix, plan.end) for i, plan in enumerate(plans)], 4, "cpu")
    selecting = [(i, plan) for i, plan in enumerate(plans) if plan.kind == Kind.SELECT]
    every = make_tiles([(i, 0, plan.end) for i, plan in selecting], 4, "cpu")
    sets = torch.tensor([plan.layer_set for _, plan in selecting])
    laziness = torch.zeros(world.bank_of.shape)
    popped = torch.full((len(plans),), -1, dtype=torch.int32)
    # What each layer of the selected requests holds, whichever bank that is in.
    held = {i: {} for i, _ in selecting}  # type: dict[int, dict[int, KV]]
    for layer in range(LAYERS):
        fresh = KV(torch.randn(tokens, 2, 3), torch.randn(tokens, 2, 3))
        want = KV(*(part.clone() for part in pool))
        at = 0
        for index, plan in enumerate(plans):
            for position in range(plan.prefix, plan.end):
                row = expected_row(case, index, layer, position)
                for target, source in zip(want, fresh, strict=True):
                    target[row] = source[at]
                at += 1
        store_new(pool, fresh, layer, new, given, world.banks)
        assert all(torch.equal(*pair) for pair in zip(pool, want, strict=True)), layer
        for index, plan in selecting:
            rows = [expected_row(case, index, layer, position) for position in range(plan.end)]
            held[index][layer] = KV(*(part[rows].clone() for part in pool))
        laziness[sets, layer] = torch.tensor([rng.random() for _ in selecting])
        found = queue_step(world.bank_of, laziness, sets, layer, KEEP).to(torch.int32)
        popped[: len(selecting)] = found
        if layer >= KEEP:
            exchange(pool, layer, every, given, world.banks, popped)
        for index, plan in selecting:
            for number, kv in held[index].items():
                bank = world.bank(index, number)
                slots = world.full(index) if bank < KEEP else world.streaming(index)
                rows = [world.row(bank, slot) for slot in slots[: plan.end]]
                assert torch.equal(pool.k[rows], kv.k) and torch.equal(pool.v[rows], kv.v), (layer, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_merge_sinks_leaves_full_requests_alone(dtype: torch.dtype) -> None:
    """With banks, only requests that are lazy in this layer get the windowed output and their sinks."""
    torch.manual_seed(2)
    prefixes, extends = [30, 0, 40], [5, 9, 6]
    of = torch.tensor([[0, LAYERS - 1], [0, 1], [0, KEEP]], dtype=torch.int32)[:, 1]
    tokens, heads = sum(extends), 2
    keys, values = (torch.randn(LAYOUT.total_rows, 1, 16).to(dtype) for _ in range(2))
    query, out, window = (torch.randn(tokens, heads, 16) for _ in range(3))
    lse = torch.randn(tokens, heads)
    units = UnitList(UNITS, 1, LAYOUT.shape.parts, "cpu")
    units.free = torch.randperm(UNITS) + 1
    slots = units.take(3 * SINK, LAYOUT.shape.streaming_units).view(3, SINK)
    tiles = make_sink_tiles(prefixes, extends, WINDOWS, "cpu", every=[True] * 3)
    untouched = out.clone()
    rest = units.rest if len(units.rest) else of
    column = BankColumn(of, of.stride(0), rest, LAYOUT.rows)
    sinks, banks = Sinks(slots, tiles, WINDOWS), (column, LAYOUT.shape)
    merge_sinks(out, lse, query, KV(keys, values), sinks, Scales(0.25), window=window, banks=banks)
    assert torch.equal(out[5:14], untouched[5:14])
    for index, where in ((0, range(5)), (2, range(14, 20))):
        rows = LAYOUT.bank_rows(int(of[index]), slots[index], units.rest)
        k, v = (part.float()[rows, 0] for part in (keys, values))
        for offset, token in enumerate(where):
            seen = prefixes[index] + offset - torch.arange(SINK) >= RECENT
            scores = torch.where(seen, query[token] @ k.T * 0.25, -torch.inf)
            weights = torch.softmax(torch.cat([lse[token, :, None] / 1.4426950408889634, scores], 1), 1)
            expected = weights[:, :1] * window[token] + weights[:, 1:] @ v
            torch.testing.assert_close(out[token], expected, atol=1e-4, rtol=1e-4)
