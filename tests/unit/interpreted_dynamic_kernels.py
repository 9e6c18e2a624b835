"""Kernels of dynamic mode under Triton's interpreter, against plain loops; test_kernels.py runs this."""

from __future__ import annotations

import random

import pytest
import torch

from lt_sglang.attention.indices import decode_kv_indices_reference
from lt_sglang.attention.kernels import decode_dynamic
from lt_sglang.attention.kernels.merge_sinks import BankColumn, Scales, Sinks, make_sink_tiles, merge_sinks
from lt_sglang.attention.kernels.store import store_kv
from lt_sglang.identify.queue import queue_step
from lt_sglang.identify.queue_kernel import queue_step as queue_step_kernel
from lt_sglang.layers.layer_sets import banks as banks_of
from lt_sglang.memory.kv import KV

from .interpreted_dynamic_cases import (
    KEEP,
    LAYERS,
    LAYOUT,
    RECENT,
    SINK,
    STREAMING,
    WINDOWS,
    World,
)


def test_kernels_are_interpreted_here() -> None:
    assert type(decode_dynamic._decode_kv_indices).__name__ == "InterpretedFunction"


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
            expected = [LAYOUT.bank_start(bank) + row for row in rows]
            assert int(pointers[layer * count + index]) == at
            assert out[at : at + len(rows)].tolist() == expected, (layer, index)
            at += len(rows)
    assert int(pointers[-1]) == at
    assert (out[at:] == -9).all()


def test_out_cache_loc_and_store() -> None:
    rng = random.Random(7)
    world = World(rng, [5, 30, 1])
    full = torch.tensor([world.full(i)[-1] for i in range(3)] + [0])
    streaming = torch.tensor([world.streaming(i)[-1] for i in range(3)] + [0])
    rows = torch.cat([world.rows, torch.tensor([0])])
    world.bank_of[0] = torch.tensor(banks_of([0, 1, 2, 3], LAYERS), dtype=torch.int32)
    out = torch.full((LAYERS, 6), -9, dtype=torch.int32)
    decode_dynamic.decode_out_cache_loc(out, world.banks, rows, full, streaming)
    for layer in range(LAYERS):
        for index in range(4):
            bank = int(world.bank_of[world.set_of[rows[index]], layer])
            slot = int(full[index] if bank < KEEP else streaming[index])
            assert int(out[layer, index]) == LAYOUT.bank_start(bank) + slot
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_merge_sinks_leaves_full_requests_alone(dtype: torch.dtype) -> None:
    """With banks, only requests that are lazy in this layer get the windowed output and their sinks."""
    torch.manual_seed(2)
    prefixes, extends = [30, 0, 40], [5, 9, 6]
    of = torch.tensor([[0, KEEP + 1], [0, 1], [0, KEEP]], dtype=torch.int32)[:, 1]
    tokens, heads = sum(extends), 2
    keys, values = (torch.randn(LAYOUT.total_rows, 1, 16).to(dtype) for _ in range(2))
    query, out, window = (torch.randn(tokens, heads, 16) for _ in range(3))
    lse = torch.randn(tokens, heads)
    rows = torch.randint(1, STREAMING, (3, SINK))
    tiles = make_sink_tiles(prefixes, extends, WINDOWS, "cpu", every=[True] * 3)
    untouched = out.clone()
    column = BankColumn(of, of.stride(0), LAYOUT.streaming_start, LAYOUT.streaming_rows)
    sinks = Sinks(rows, tiles, WINDOWS)
    merge_sinks(out, lse, query, KV(keys, values), sinks, Scales(0.25), window=window, banks=(column, KEEP))
    assert torch.equal(out[5:14], untouched[5:14])
    for index, where in ((0, range(5)), (2, range(14, 20))):
        start = LAYOUT.bank_start(int(of[index]))
        k, v = (part.float()[start + rows[index], 0] for part in (keys, values))
        for offset, token in enumerate(where):
            seen = prefixes[index] + offset - torch.arange(SINK) >= RECENT
            scores = torch.where(seen, query[token] @ k.T * 0.25, -torch.inf)
            weights = torch.softmax(torch.cat([lse[token, :, None] / 1.4426950408889634, scores], 1), 1)
            expected = weights[:, :1] * window[token] + weights[:, 1:] @ v
            torch.testing.assert_close(out[token], expected, atol=1e-4, rtol=1e-4)
