"""Requests and a device for tests of the sink store."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lt_sglang.memory.sinks import SinkKey, SinkStore

SLOTS = 60
OTHERS = 1000  # a slot's row in the second of its units, less the slot


@dataclass
class Request:
    """A running request: its row of req_to_token (None before and after), and its sinks' slots."""

    name: str
    key: SinkKey
    row: int | None = None
    slots: list[int] = field(default_factory=list)

    def where(self) -> int | None:
        return self.row


class Source:
    """Slots behind those of requests; each has a row in two units."""

    def __init__(self, slots: int, page_size: int = 1) -> None:
        self.page_size = page_size
        first = -(-(SLOTS + 1) // page_size) * page_size
        self.all = list(range(first, first + slots, page_size))
        self.free = list(self.all)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Whole pages; None if there are fewer."""
        assert need_size and need_size % self.page_size == 0
        pages = need_size // self.page_size
        if pages > len(self.free):
            return None
        taken, self.free = self.free[:pages], self.free[pages:]
        return torch.tensor([slot + i for slot in taken for i in range(self.page_size)])

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
        """Take them back."""
        assert start_pos == 0
        pages = free_index[:: self.page_size].tolist()
        assert not set(pages) & set(self.free) and set(pages) <= set(self.all)
        self.free += pages

    def rows_in_parts(self, slots: torch.Tensor) -> torch.Tensor:
        """Their rows in both units."""
        return torch.stack([slots, slots + OTHERS])


class Device:
    """One streaming buffer of whole numbers, and the store under test."""

    def __init__(self, capacity: int, sink_tokens: int, rows: int = 16, slots: int | None = None) -> None:
        self.source = Source(capacity * sink_tokens if slots is None else slots)
        self.store = SinkStore(capacity, sink_tokens, rows, "cpu", self.source)
        self.buffer = torch.zeros(2 * OTHERS, dtype=torch.int64)
        self.copies = 0

    def write(self, request: Request, value: int) -> None:
        """The forward that computes the request's sinks: position i holds value + i."""
        for position, slot in enumerate(request.slots):
            self.buffer[slot] = value + position
            self.buffer[slot + OTHERS] = -(value + position)

    def capture(self, request: Request) -> bool:
        return self.store.capture(
            request.name, request.key, request.where, lambda: torch.tensor(request.slots)
        )

    def flush(self) -> None:
        def copy(target: torch.Tensor, source: torch.Tensor) -> None:
            self.copies += len(target) // 2
            self.buffer[target] = self.buffer[source]

        self.store.flush(copy)

    def stored(self, row: int) -> list[int] | None:
        """What the request in ``row`` reads as its sinks, or None if it reads its own slots."""
        index = int(self.store.set_of[row])
        if index < 0:
            return None
        slots = self.store.slots_of[index].to(torch.int64)
        first, second = (self.buffer[rows].tolist() for rows in self.source.rows_in_parts(slots))
        assert second == [-value for value in first], "copied in the first of its units only"
        return first


def request(name: str, row: int, key: str = "", first_slot: int = 1) -> Request:
    return Request(name, (key or name,), row, list(range(first_slot, first_slot + 3)))
