"""Lists of a dynamic prefill under Triton's interpreter, against plain loops; test_kernels.py runs this."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lt_sglang.attention.kernels.extend_dynamic import every_kv_indices, extend_kv_indices, extend_kv_indptr
from lt_sglang.attention.kernels.place import settle, store_new
from lt_sglang.attention.kernels.tiles import make_tiles
from lt_sglang.identify.queue import queue_step
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.kv import KV

from .interpreted_dynamic_cases import (
    KEEP,
    LAYERS,
    LAYOUT,
    RECENT,
    SINK,
    Chunk,
    World,
    chunk,
)


def expected_row(case: Chunk, index: int, layer: int, position: int, scratch: bool) -> int:
    """Where a position is before it is decided upon, in the order of memory/banks.py."""
    plan, world = case.plans[index], case.world
    if plan.kind == Kind.KNOWN:
        bank = world.bank(index, layer)
        slot = world.full(index)[position] if bank < KEEP else world.streaming(index)[position]
        return LAYOUT.bank_start(bank) + slot
    if layer < KEEP:
        return LAYOUT.bank_start(layer) + world.full(index)[position]
    if scratch and position >= plan.prefix:
        before = sum(other.extend for other in case.plans[:index])
        return LAYOUT.scratch_start + before + position - plan.prefix
    return LAYOUT.staging_bank_start(layer) + position


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
                expected = [expected_row(case, index, layer, p, scratch=True) for p in positions]
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
            rows = [expected_row(case, index, layer, p, scratch=False) for p in range(plan.prefix)]
            assert out[layer, at : at + len(rows)].tolist() == rows, (layer, index)
            at += len(rows)
        assert out.shape == (LAYERS, at)


@pytest.mark.parametrize("seed", range(3))
def test_lists_of_every_layer_from_somewhere_on(seed: int) -> None:
    """Cached and new tokens; those of undecided requests are scratch rows from layer P on."""
    case = chunk(seed, short=False)
    given, ends = case.requests(), [plan.end for plan in case.plans]
    firsts = [max(plan.prefix - RECENT + 1, 0) for plan in case.plans]
    out = every_kv_indices(case.world.banks, given, firsts, ends)
    for layer in range(LAYERS):
        at = 0
        for index, first in enumerate(firsts):
            rows = [expected_row(case, index, layer, p, scratch=True) for p in range(first, ends[index])]
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
            start = LAYOUT.bank_start(bank) + LAYOUT.sink_base + 2 * SINK
            assert out[layer, :left].tolist() == list(range(start, start + left))


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_place(seed: int, ragged: bool) -> None:
    """Two requests are decided, one is staged, two were decided before; every layer in turn."""
    case = chunk(seed, short=ragged)
    world, plans, given = case.world, case.plans, case.requests()
    rng = random.Random(seed + 100)
    pool_k = torch.arange(LAYOUT.total_rows * 6, dtype=torch.float32).view(-1, 2, 3).contiguous()
    pool_v = -pool_k
    tokens = sum(plan.extend for plan in plans)
    new = [(i, plan.prefix, plan.end) for i, plan in enumerate(plans)]
    cut = [
        (i, 0 if plan.kind == Kind.SELECT else plan.prefix, plan.end)
        for i, plan in enumerate(plans)
        if plan.kind == Kind.SELECT or (ragged and plan.kind == Kind.KNOWN)
    ]
    stage = [run for run in new if plans[run[0]].kind == Kind.STAGED]
    tiles = {
        name: make_tiles(runs, 4, "cpu") for name, runs in (("new", new), ("cut", cut), ("stage", stage))
    }
    deciding = [plan for plan in plans if plan.kind == Kind.SELECT]
    sets = torch.tensor([plan.layer_set for plan in deciding])
    laziness = torch.zeros(world.bank_of.shape)
    popped = torch.full((len(plans),), -1, dtype=torch.int32)
    for layer in range(LAYERS):
        k, v = torch.randn(tokens, 2, 3), torch.randn(tokens, 2, 3)
        want_k, want_v = pool_k.clone(), pool_v.clone()

        def put(row: int, source_k: Any, source_v: Any, want=(want_k, want_v)) -> None:
            want[0][row], want[1][row] = source_k, source_v

        def run(name: str, *done: torch.Tensor, parts=(k, v), number=layer) -> None:
            put_where = settle if done else store_new
            put_where(KV(pool_k, pool_v), KV(*parts), number, tiles[name], given, world.banks, *done)

        token = [sum(plan.extend for plan in plans[:i]) for i in range(len(plans))]
        source: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, plan in enumerate(plans):
            fresh = slice(token[index], token[index] + plan.extend)
            old_k, old_v = torch.empty(0, 2, 3), torch.empty(0, 2, 3)
            if plan.prefix and layer >= KEEP:
                start = LAYOUT.staging_bank_start(layer)
                old_k = pool_k[start : start + plan.prefix].clone()
                old_v = pool_v[start : start + plan.prefix].clone()
            else:
                old_k, old_v = torch.zeros(plan.prefix, 2, 3), torch.zeros(plan.prefix, 2, 3)
            source[index] = (torch.cat([old_k, k[fresh]]), torch.cat([old_v, v[fresh]]))
            early = plan.kind == Kind.KNOWN or layer < KEEP or not ragged
            for position in range(plan.prefix, plan.end):
                if early:
                    row = expected_row(case, index, layer, position, scratch=True)
                    put(row, source[index][0][position], source[index][1][position])
        if not ragged:
            run("new")
            assert torch.equal(pool_k, want_k) and torch.equal(pool_v, want_v)
        elif layer < KEEP:
            run("new")
        laziness[sets, layer] = torch.tensor([rng.random() for _ in deciding])
        popped[: len(deciding)] = queue_step(world.bank_of, laziness, sets, layer, KEEP).to(torch.int32)
        if layer >= KEEP:
            for index, plan in enumerate(plans):
                streaming, full = world.streaming(index), world.full(index)
                if plan.kind == Kind.SELECT:
                    gone = int(popped[deciding.index(plan)])
                    bank = world.bank(index, layer)
                    cut_k, cut_v = (tensor.clone() for tensor in source[index])
                    if gone != layer:
                        rows = LAYOUT.bank_start(bank) + torch.tensor(full)
                        cut_k, cut_v = pool_k[rows].clone(), pool_v[rows].clone()
                        for position, row in enumerate(rows.tolist()):
                            put(row, source[index][0][position], source[index][1][position])
                    start = LAYOUT.bank_start(layer)
                    for position, slot in enumerate(streaming):
                        if slot:
                            put(start + slot, cut_k[position], cut_v[position])
                    sink_set = int(world.sink_set_of[world.rows[index]])
                    for position in range(SINK if sink_set >= 0 else 0):
                        row = start + LAYOUT.sink_base + sink_set * SINK + position
                        put(row, cut_k[position], cut_v[position])
                elif plan.kind == Kind.STAGED:
                    for position in range(plan.prefix, plan.end):
                        row = LAYOUT.staging_bank_start(layer) + position
                        put(row, source[index][0][position], source[index][1][position])
            run("cut", popped)
            run("stage", popped)
        assert torch.equal(pool_k, want_k) and torch.equal(pool_v, want_v), layer
