"""lt_sglang.attention.indices: which rows a lazy layer reads, against the definition."""

from __future__ import annotations

import random

import pytest
import torch

from lt_sglang.attention.indices import (
    StreamingTables,
    Windows,
    decode_kv_indices_reference,
    lazy_lengths,
    sink_slots,
    span_slots,
)
from tests.unit.streaming import Batch, visible

SIZES = [(0, 1), (0, 5), (1, 1), (4, 3), (4, 8), (7, 64), (129, 17)]


@pytest.mark.parametrize(("sink", "recent"), SIZES)
def test_decode_reads_exactly_the_visible_set(sink: int, recent: int) -> None:
    rng = random.Random(sink * 1000 + recent)
    batch = Batch(
        rng, sink, recent, lengths=[1, 2, recent, recent + 1, sink + recent, sink + recent + 1, 300]
    )
    packed = decode_kv_indices_reference(batch.rows, batch.lengths, batch.tables, batch.windows)
    assert packed.dtype == torch.int32
    counts = lazy_lengths(batch.lengths, batch.windows).tolist()
    for index, got in enumerate(packed.split(counts)):
        length = int(batch.lengths[index])
        expected = sorted(batch.row_of_position(index, j) for j in visible(length - 1, sink, recent))
        assert sorted(got.tolist()) == expected


def test_attention_over_the_rows_is_streaming_attention() -> None:
    rng = random.Random(5)
    generator = torch.Generator().manual_seed(5)
    for sink, recent in SIZES:
        batch = Batch(rng, sink, recent, lengths=[1, recent + sink + 3, 200])
        keys = torch.randn(batch.buffer_rows, 8, generator=generator, dtype=torch.float64)
        values = torch.randn(batch.buffer_rows, 8, generator=generator, dtype=torch.float64)
        query = torch.randn(len(batch.rows), 8, generator=generator, dtype=torch.float64)
        packed = decode_kv_indices_reference(batch.rows, batch.lengths, batch.tables, batch.windows).long()
        counts = lazy_lengths(batch.lengths, batch.windows).tolist()
        for index, selected in enumerate(packed.split(counts)):
            length = int(batch.lengths[index])
            # Keys by position, as full attention would see them, under the definition's mask.
            rows = [batch.row_of_position(index, j) for j in range(length)]
            scores = keys[rows] @ query[index]
            hidden = [j for j in range(length) if j not in visible(length - 1, sink, recent)]
            scores[hidden] = float("-inf")
            expected = torch.softmax(scores, 0) @ values[rows]
            got = torch.softmax(keys[selected] @ query[index], 0) @ values[selected]
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("sink", "recent"), SIZES)
def test_sink_slots(sink: int, recent: int) -> None:
    batch = Batch(random.Random(9), sink, recent, lengths=[300, 301, 302])
    slots = sink_slots(batch.rows, batch.tables, batch.windows)
    assert slots.shape == (3, sink)
    for index in range(3):
        # Once a request has a set, its sinks are read there, wherever the window is.
        stored = int(batch.tables.sink_set_of[batch.rows[index]])
        own = [batch.slot_of_position(index, position) for position in range(sink)]
        expected = batch.tables.sink_slots_of[stored].tolist() if stored >= 0 else own
        assert slots[index].tolist() == expected


def test_span_slots() -> None:
    rng = random.Random(3)
    batch = Batch(rng, 4, 8, lengths=[50, 60, 70])
    first, counts = torch.tensor([10, 0, 69]), torch.tensor([5, 0, 1])
    full, streaming = span_slots(batch.rows, first, counts, 6, batch.tables)
    positions = [(0, j) for j in range(10, 15)] + [(2, 69)]
    assert streaming.tolist() == [batch.slot_of_position(*at) for at in positions]
    table = batch.tables.req_to_token
    assert full.tolist() == [int(table[batch.rows[request], j]) for request, j in positions]
    assert full.dtype == streaming.dtype == torch.int32


def test_lazy_lengths_keep_dtype() -> None:
    windows = Windows(sink_tokens=4, recent_tokens=6)
    for dtype in (torch.int32, torch.int64):
        got = lazy_lengths(torch.tensor([1, 9, 10, 11, 1000], dtype=dtype), windows)
        assert got.dtype == dtype
        assert got.tolist() == [1, 9, 10, 10, 10]


def test_tables_are_read_at_the_requests_rows_only() -> None:
    tables = StreamingTables(
        req_to_token=torch.tensor([[0, 0, 0], [1, 2, 3]], dtype=torch.int32),
        full_to_streaming=torch.tensor([0, 7, 8, 9]),
        sink_set_of=torch.tensor([-1, -1], dtype=torch.int32),
        sink_slots_of=torch.tensor([[5]], dtype=torch.int32),
    )
    windows = Windows(sink_tokens=1, recent_tokens=1)
    got = decode_kv_indices_reference(torch.tensor([1]), torch.tensor([3]), tables, windows)
    assert got.tolist() == [7, 9]


def test_everything_stays_on_the_device_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of it is made on the host, which would wait for the device."""
    arange, made = torch.arange, []
    monkeypatch.setattr(
        torch, "arange", lambda *given, **named: made.append(arange(*given, **named)) or made[-1]
    )

    def on_device(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tables = StreamingTables(
        on_device(4, 30, dtype=torch.int32),
        on_device(99, dtype=torch.int64),
        on_device(4, dtype=torch.int32),
        on_device(7, 4, dtype=torch.int32),
    )
    rows, counts = on_device(2, dtype=torch.int64), on_device(2, dtype=torch.int64)
    found = [*span_slots(rows, counts, counts, 7, tables), sink_slots(rows, tables, Windows(4, 8))]
    assert {tensor.device.type for tensor in (*found, *made)} == {"meta"} and len(made) >= 3
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in found] == [
        ((7,), torch.int32),
        ((7,), torch.int32),
        ((2, 4), torch.int64),
    ]
