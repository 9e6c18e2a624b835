"""Kernels of static mode under Triton's interpreter, against plain torch; test_kernels.py runs this."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from lt_sglang.attention.indices import decode_kv_indices_reference, lazy_lengths, sink_slots
from lt_sglang.attention.kernels import merge_sinks as kernels
from lt_sglang.attention.kernels.decode_static import decode_kv_indices
from lt_sglang.attention.kernels.merge_sinks import TILE_QUERIES, Scales, Sinks, make_sink_tiles, merge_sinks
from lt_sglang.memory.kv import KV
from tests.unit.streaming import Batch, visible


def test_kernels_are_interpreted_here() -> None:
    assert type(kernels._merge_sinks).__name__ == "InterpretedFunction", (
        "run this file through tests/unit/test_kernels.py, which sets TRITON_INTERPRET"
    )


@pytest.mark.parametrize(
    ("sink", "recent"), [(0, 1), (0, 9), (1, 1), (4, 8), (4, 1100), (129, 17), (129, 1025)]
)
@pytest.mark.parametrize("captured", [True, False])
def test_decode_kv_indices_equal_the_reference(sink: int, recent: int, captured: bool) -> None:
    lengths = [1, 2, recent, recent + 1, sink + recent, sink + recent + 1, sink + recent + 90]
    batch = Batch(random.Random(sink + recent), sink, recent, lengths, captured)
    expected = decode_kv_indices_reference(batch.rows, batch.lengths, batch.tables, batch.windows)
    counts = lazy_lengths(batch.lengths, batch.windows)
    indptr = torch.zeros(len(counts) + 1, dtype=torch.int32)
    indptr[1:] = torch.cumsum(counts, 0)
    out = torch.full((int(indptr[-1]) + 7,), -5, dtype=torch.int32)
    decode_kv_indices(out, indptr, batch.rows, batch.lengths.to(torch.int32), batch.tables, batch.windows)
    # Order counts too: the same row for the same place in the list.
    assert out[: len(expected)].tolist() == expected.tolist()
    assert (out[len(expected) :] == -5).all(), "nothing is written behind the last request"


@dataclass(frozen=True)
class Case:
    """Requests as (prefix, extend) token counts, and the shape of the attention."""

    requests: tuple[tuple[int, int], ...]
    sink: int
    recent: int
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    dtype: torch.dtype = torch.float32
    captured: bool = True
    key_scale: float = 1.0
    value_scale: float = 1.0
    kv_dtype: torch.dtype | None = None


CASES = {
    "first chunk": Case(((0, 90),), sink=4, recent=20),
    "later chunk": Case(((70, 40),), sink=4, recent=20),
    "chunk across the window's edge": Case(((15, 20),), sink=4, recent=20),
    "several requests": Case(((0, 30), (64, 1), (5, 3), (200, 70)), sink=4, recent=12),
    "more queries than a tile": Case(((3, 2 * TILE_QUERIES + 5),), sink=4, recent=7),
    "one sink": Case(((40, 10),), sink=1, recent=9),
    "129 sinks, three blocks of them": Case(((150, 8), (0, 200)), sink=129, recent=33),
    "window of one token": Case(((10, 6),), sink=4, recent=1),
    "sinks partly inside the window": Case(((0, 40),), sink=16, recent=10),
    "grouped heads, 64": Case(((30, 9),), sink=4, recent=8, heads=4, kv_heads=2, dim=64),
    "grouped heads, 128": Case(((30, 9),), sink=4, recent=8, heads=6, kv_heads=2, dim=128),
    "head size between powers of two": Case(((30, 9),), sink=4, recent=8, dim=80),
    "half precision": Case(((30, 9),), sink=4, recent=8, dim=64, dtype=torch.float16),
    "sinks still in their slots": Case(((20, 30),), sink=4, recent=8, captured=False),
    "scaled KV": Case(((30, 9),), sink=4, recent=8, key_scale=0.5, value_scale=2.0),
    "fp8 KV": Case(
        ((30, 9), (12, 7)),
        sink=4,
        recent=8,
        dtype=torch.float16,
        key_scale=0.5,
        value_scale=2.0,
        kv_dtype=torch.float8_e4m3fn,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merge_sinks_completes_streaming_attention(case: Case) -> None:
    generator = torch.Generator().manual_seed(7)
    lengths = [prefix + extend for prefix, extend in case.requests]
    # A prefill keeps its own tokens and the window before them, so nothing is freed here.
    batch = Batch(random.Random(7), case.sink, case.recent, lengths, captured=False)
    if case.captured:
        _capture(batch)
    shape = (batch.buffer_rows, case.kv_heads, case.dim)
    keys = torch.randn(shape, generator=generator).to(case.kv_dtype or case.dtype)
    values = torch.randn(shape, generator=generator).to(case.kv_dtype or case.dtype)
    tokens = sum(extend for _, extend in case.requests)
    query = torch.randn((tokens, case.heads, case.dim), generator=generator).to(case.dtype)
    scale = case.dim**-0.5
    group = case.heads // case.kv_heads

    out = torch.empty(tokens, case.heads, case.dim)
    lse = torch.empty(tokens, case.heads)
    expected = torch.empty(tokens, case.heads, case.dim)
    token = 0
    for index, (prefix, extend) in enumerate(case.requests):
        rows = [_row(batch, index, position) for position in range(prefix + extend)]
        key = (keys.float()[rows] * case.key_scale).repeat_interleave(group, 1)
        value = (values.float()[rows] * case.value_scale).repeat_interleave(group, 1)
        for position in range(prefix, prefix + extend):
            scores = torch.einsum("hd,khd->hk", query[token].float(), key) * scale
            window = list(range(max(0, position - case.recent + 1), position + 1))
            seen = visible(position, case.sink, case.recent)
            out[token] = torch.einsum("hk,khd->hd", scores[:, window].softmax(1), value[window])
            lse[token] = scores[:, window].logsumexp(1) * kernels.LOG2E
            expected[token] = torch.einsum("hk,khd->hd", scores[:, seen].softmax(1), value[seen])
            token += 1

    got = out.clone().to(case.dtype)
    prefixes, extends = zip(*case.requests, strict=True)
    sinks = sinks_of(batch, prefixes, extends)
    scales = Scales(scale, case.key_scale, case.value_scale)
    merge_sinks(got, lse, query, KV(keys, values), sinks, scales)
    tolerance = 1e-5 if case.dtype is torch.float32 else 4e-3
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)
    assert not torch.allclose(out, expected, atol=1e-3), "the case must need the merge"


def test_queries_are_read_by_their_stride() -> None:
    """Models hand over a slice of a fused projection: rows further apart than heads * dim."""
    batch = Batch(random.Random(1), 4, 8, [40], captured=False)
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(batch.buffer_rows, 1, 16, generator=generator)
    values = torch.randn(batch.buffer_rows, 1, 16, generator=generator)
    fused = torch.randn(40, 5 * 16, generator=generator)
    query = fused[:, : 2 * 16].view(40, 2, 16)
    results = []
    for one in (query, query.contiguous()):
        out, lse = torch.zeros(40, 2, 16), torch.zeros(40, 2)
        merge_sinks(out, lse, one, KV(keys, values), sinks_of(batch, [0], [40]), Scales(0.25))
        results.append(out)
    torch.testing.assert_close(results[0], results[1])
    assert results[0].abs().sum() > 0


def test_no_tiles_leaves_the_output_alone() -> None:
    batch = Batch(random.Random(1), 4, 50, [20], captured=False)
    sinks = sinks_of(batch, [0], [20])
    assert sinks.tiles.number == 0
    out = torch.ones(20, 1, 16)
    keys = torch.zeros(batch.buffer_rows, 1, 16)
    merge_sinks(out, torch.zeros(20, 1), out.clone(), KV(keys, keys), sinks, Scales(1.0))
    assert (out == 1).all()


@pytest.mark.parametrize("seed", range(20))
def test_tiles_cover_every_query_that_sees_a_sink_once(seed: int) -> None:
    rng = random.Random(seed)
    batch = Batch(rng, rng.choice([1, 4, 129]), rng.randrange(1, 300), [1])
    prefixes = [rng.randrange(0, 400) for _ in range(5)]
    extends = [rng.randrange(0, 300) for _ in range(5)]
    tiles = make_sink_tiles(prefixes, extends, batch.windows, "cpu")
    table = [getattr(tiles, name).tolist() for name in ("request", "token", "position", "queries")]
    covered = []
    for request, token, position, count in zip(*table, strict=True):
        assert 1 <= count <= TILE_QUERIES
        covered += [(request, token + i, position + i) for i in range(count)]
    expected = []
    token = 0
    for request, (prefix, extend) in enumerate(zip(prefixes, extends, strict=True)):
        behind = range(max(0, batch.windows.recent_tokens - prefix), extend)
        expected += [(request, token + i, prefix + i) for i in behind]
        token += extend
    assert sorted(covered) == expected


def sinks_of(batch: Batch, prefixes: Sequence[int], extends: Sequence[int]) -> Sinks:
    rows = sink_slots(batch.rows, batch.tables, batch.windows)
    tiles = make_sink_tiles(list(prefixes), list(extends), batch.windows, "cpu")
    return Sinks(rows, tiles, batch.windows)


def _capture(batch: Batch) -> None:
    for index, row in enumerate(batch.rows.tolist()):
        batch.tables.sink_set_of[row] = index


def _row(batch: Batch, index: int, position: int) -> int:
    """Where a prefill reads a position: every sink in its set once there is one."""
    stored = int(batch.tables.sink_set_of[batch.rows[index]])
    if position < batch.sink and stored >= 0:
        return int(batch.tables.sink_slots_of[stored, position])
    return batch.slot_of_position(index, position)
