"""Copies of sink sets in host memory, so that a cached prefix that comes back finds its sinks.

A set is w_sink tokens in the lazy layers; copies are made as sets are captured (memory/sinks.py), kept by
least recent use, and outlive the sets.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch

from lt_sglang.memory.host import HostMemory, HostPool


class HostSinks:
    """A fixed number of sets in the host memory of the streaming pool.

    Args:
        memory: where they are.
        pool: of the streaming layers; its slots are taken once, here and in ``clear``.
        sets: how many.
        sink_tokens: w_sink.
        slots_of_set: slots that a set takes, whole pages.
    """

    def __init__(
        self, memory: HostMemory, pool: HostPool, sets: int, sink_tokens: int, slots_of_set: int
    ) -> None:
        self.sets = sets
        self._memory = memory
        self._pool = pool
        self._sink_tokens = sink_tokens
        self.slots_of_set = slots_of_set
        self.clear()

    def clear(self) -> None:
        """Forget all; after the pool was cleared."""
        slots = self._pool.alloc(self.sets * self.slots_of_set)
        assert slots is not None, "host memory holds fewer sink sets than were asked for"
        first = slots.view(self.sets, self.slots_of_set)[:, : self._sink_tokens]
        self._rows = self._pool.rows_in_parts(first.flatten()).view(-1, self.sets, self._sink_tokens)
        self._index_of: OrderedDict[Hashable, int] = OrderedDict()
        self._free = list(range(self.sets))

    def __contains__(self, key: Hashable) -> bool:
        return key in self._index_of

    def __len__(self) -> int:
        return len(self._index_of)

    @property
    def slots(self) -> int:
        """Slots that all sets take, used or not."""
        return self.sets * self.slots_of_set

    def touch(self, key: Hashable) -> None:
        """``key`` becomes the most recently used, if it is there."""
        if key in self._index_of:
            self._index_of.move_to_end(key)

    def keep(self, key: Hashable) -> int:
        """Where a copy of ``key`` goes: the set that was its own, a free one, or the longest unused."""
        index = self._index_of.pop(key, None)
        if index is None:
            index = self._free.pop() if self._free else self._index_of.popitem(last=False)[1]
        self._index_of[key] = index
        return index

    def find(self, key: Hashable) -> int:
        """Where ``key``, which is there, is kept."""
        self.touch(key)
        return self._index_of[key]

    def forget(self, key: Hashable) -> None:
        """Its copy was never made."""
        index = self._index_of.pop(key, None)
        if index is not None:
            self._free.append(index)

    def back_up(self, sets: list[int], rows: list[torch.Tensor]) -> None:
        """Copy rows of the device (int64 [units, w_sink] a set) to host ``sets``, on the current stream."""
        self._memory.back_up(self._host_rows(sets), torch.stack(rows).flatten())

    def restore(self, sets: list[int], rows: list[torch.Tensor]) -> None:
        """The inverse of ``back_up``."""
        self._memory.restore(self._host_rows(sets), torch.stack(rows).flatten())

    def _host_rows(self, sets: list[int]) -> torch.Tensor:
        return self._memory.moved(self._rows[:, sets].transpose(0, 1).flatten())
