"""A random batch in a streaming pool, and the definition of what a lazy layer sees."""

from __future__ import annotations

import random

import torch

from lt_sglang.attention.indices import StreamingTables, Windows


def visible(position: int, sink: int, recent: int) -> list[int]:
    """Positions the query at ``position`` sees in a lazy layer."""
    return [j for j in range(position + 1) if j < sink or position - j < recent]


class Batch:
    """Requests with shuffled slots; those longer than their window have a sink set.

    Every other one of the rest has one, too: a request that shares a prefix may get its set early. Slots
    outside a long request's window are unmapped (streaming slot 0), as after the window slid on.
    """

    def __init__(
        self, rng: random.Random, sink: int, recent: int, lengths: list[int], captured: bool = True
    ) -> None:
        count, context = len(lengths), max(lengths) + 3
        self.sink = sink
        total = sum(lengths)
        full = rng.sample(range(1, total + 20), total)
        streaming = rng.sample(range(1, total + 20), total)
        sets = rng.sample(range(count + 4), count)
        self.windows = Windows(sink, recent)
        self.buffer_rows = total + 20 + (count + 4) * sink
        sink_slots_of = torch.tensor(
            rng.sample(range(total + 20, self.buffer_rows), (count + 4) * sink), dtype=torch.int32
        ).view(count + 4, sink)
        req_to_token = torch.zeros(count + 3, context, dtype=torch.int32)
        full_to_streaming = torch.zeros(total + 22, dtype=torch.int64)
        sink_set_of = torch.full((count + 3,), -1, dtype=torch.int32)
        rows = rng.sample(range(1, count + 3), count)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            outgrown = length > max(recent, sink, 2)
            if sink and captured and (outgrown or index % 2):
                sink_set_of[row] = sets[index]
            for position in range(length):
                slot = full.pop()
                req_to_token[row, position] = slot
                kept = not captured or position >= length - max(recent, sink, 2) or not outgrown
                full_to_streaming[slot] = streaming.pop() if kept else 0
        self.rows = torch.tensor(rows)
        self.lengths = torch.tensor(lengths)
        self.tables = StreamingTables(req_to_token, full_to_streaming, sink_set_of, sink_slots_of)

    def slot_of_position(self, index: int, position: int) -> int:
        """The allocator's streaming slot of a position, 0 if it was freed."""
        full = self.tables.req_to_token[self.rows[index], position]
        return int(self.tables.full_to_streaming[full.long()])

    def row_of_position(self, index: int, position: int) -> int:
        """Where request ``index``'s last query reads a position; sinks that left its window: in their set."""
        stored = int(self.tables.sink_set_of[self.rows[index]])
        outside = position < int(self.lengths[index]) - self.windows.recent_tokens
        if position < self.sink and outside and stored >= 0:
            return int(self.tables.sink_slots_of[stored, position])
        return self.slot_of_position(index, position)
