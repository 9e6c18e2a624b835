"""lt_sglang.layers.async_host_copy and memory.row_table: device tables, and what the host sees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lt_sglang.layers.async_host_copy import AsyncHostCopy
from lt_sglang.memory.row_table import set_rows


def test_a_host_copy_has_the_values_and_the_dtype_of_what_it_shows() -> None:
    table = torch.tensor([(1 << 53) + 1, 2])
    copied = AsyncHostCopy(table)
    assert copied.read() == [(1 << 53) + 1, 2] and copied._host.dtype == table.dtype
    table += 1
    assert copied.read() == [(1 << 53) + 2, 3]


def test_a_host_copy_of_a_gpu_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows what the last copy brought, and begins the next one only once that is there."""
    events: list[Any] = []

    class Event:
        done = False

        def record(self) -> None:
            events.append(self)

        def query(self) -> bool:
            return self.done

    class Host:
        values = [0]

        def copy_(self, source: Any, non_blocking: bool) -> None:
            assert non_blocking is True
            events.append(source.value)

        def tolist(self) -> list[int]:
            return self.values

    monkeypatch.setattr(torch.cuda, "Event", Event)
    copied = AsyncHostCopy(torch.zeros(1, dtype=torch.int64))
    tensor = SimpleNamespace(is_cuda=True, value=5)
    copied._tensor, copied._host = tensor, Host()  # type: ignore[assignment]
    assert copied.read() == [0] and events[0] == 5 and len(events) == 2
    first = events[1]
    assert copied.read() == [0] and len(events) == 2, "still on its way"
    first.done, Host.values, tensor.value = True, [5], 6
    assert copied.read() == [5] and events[2] == 6 and events[3] is not first
    Host.values = [6]
    assert copied.read() == [5] and len(events) == 4


def test_rows_are_written_where_the_table_is() -> None:
    table = torch.zeros(4, dtype=torch.int32)
    set_rows(table, {1: 5, 3: 7})
    set_rows(table, {})
    assert table.tolist() == [0, 5, 0, 7]
    moved: list[str] = []

    class Elsewhere(torch.Tensor):
        device = "elsewhere"  # type: ignore[assignment]

        def index_copy_(self, dim: int, rows: torch.Tensor, new: torch.Tensor) -> None:  # type: ignore[override]
            moved.append("written")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: moved.append(device) or self)
        set_rows(table.as_subclass(Elsewhere), {1: 5})
    assert moved == ["elsewhere", "elsewhere", "written"]
