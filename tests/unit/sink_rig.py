"""Requests and a device for tests of the sink store."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lt_sglang.memory.sinks import SinkKey, SinkStore

SLOTS = 60
BASE = SLOTS + 1


@dataclass
class Request:
    """A running request: its row of req_to_token (None before and after), and its sinks' slots."""

    name: str
    key: SinkKey
    row: int | None = None
    slots: list[int] = field(default_factory=list)

    def where(self) -> int | None:
        return self.row


class Device:
    """One streaming buffer of whole numbers, and the store under test."""

    def __init__(self, capacity: int, sink_tokens: int, rows: int = 16) -> None:
        self.store = SinkStore(capacity, sink_tokens, rows, "cpu")
        self.buffer = torch.zeros(BASE + capacity * sink_tokens, dtype=torch.int64)
        self.copies = 0

    def write(self, request: Request, value: int) -> None:
        """The forward that computes the request's sinks: position i holds value + i."""
        for position, slot in enumerate(request.slots):
            self.buffer[slot] = value + position

    def capture(self, request: Request) -> bool:
        return self.store.capture(
            request.name, request.key, request.where, lambda: torch.tensor(request.slots)
        )

    def flush(self) -> None:
        def copy(target: torch.Tensor, source: torch.Tensor) -> None:
            self.copies += len(target)
            self.buffer[target] = self.buffer[source]

        self.store.flush(BASE, copy)

    def stored(self, row: int) -> list[int] | None:
        """What the request in ``row`` reads as its sinks, or None if it reads its own slots."""
        index = int(self.store.set_of[row])
        if index < 0:
            return None
        first = BASE + index * self.store.sink_tokens
        return self.buffer[first : first + self.store.sink_tokens].tolist()


def request(name: str, row: int, key: str = "", first_slot: int = 1) -> Request:
    return Request(name, (key or name,), row, list(range(first_slot, first_slot + 3)))
