"""The sink store: K and V of the first w_sink tokens of a request, kept apart from its slots.

K and V of the first w_sink positions depend on those tokens alone (causal attention), so requests that begin
alike share one set of rows. A set is w_sink streaming slots of its own, taken from the same memory as all
others and given back as the set goes.

A request takes a set when its window is about to leave position 0; until then its sinks are ordinary
slots. The store is host state that every rank keeps alike; what the device must do (copy rows, point
requests at sets) is queued and done by ``flush`` on the forward stream, before the forward that needs
it and after every forward that still uses the old slots. K and V are written by forwards, and by HiCache's
loads, before which ``flush_copies`` is called. So slots that were freed meanwhile still hold what is copied.

With HiCache the store has copies of its sets in host memory (memory/host_sinks.py). A set that was dropped
comes back from there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lt_sglang.memory.row_table import set_rows

NO_SET = -1

SinkKey = tuple[Hashable, ...]


class SlotSource(Protocol):
    """Where the slots of sets come from: SlotAllocator (memory/allocator.py)."""

    page_size: int

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """``need_size`` slots, whole pages; None if there are fewer."""
        ...

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
        """Take them back."""
        ...

    def rows_in_parts(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of ``slots`` in each of their units now; int64 [units, n]."""
        ...


class HostSets(Protocol):
    """Copies in host memory: HostSinks (memory/host_sinks.py)."""

    def __contains__(self, key: Hashable) -> bool: ...

    def touch(self, key: Hashable) -> None:
        """``key`` becomes the most recently used, if it is there."""
        ...

    def keep(self, key: Hashable) -> int:
        """The host set that ``key`` is to be copied to."""
        ...

    def find(self, key: Hashable) -> int:
        """The host set of ``key``, which is there."""
        ...

    def forget(self, key: Hashable) -> None:
        """Its copy was never made."""
        ...

    def clear(self) -> None:
        """Forget all."""
        ...

    def back_up(self, sets: list[int], rows: list[torch.Tensor]) -> None:
        """Copy rows (int64 [units, w_sink] a set) to host ``sets``."""
        ...

    def restore(self, sets: list[int], rows: list[torch.Tensor]) -> None:
        """The inverse."""
        ...


@dataclass
class SinkSet:
    """One set: its index, what it holds, its slots, and the ids of the requests that use it.

    kept: whether it outlives its last user.
    """

    index: int
    key: SinkKey
    slots: torch.Tensor
    kept: bool = True
    users: set[str] = field(default_factory=set)


@dataclass
class SinkStats:
    """Counters since the start, for metrics and tests.

    refused: requests that found no slot. restored: sets that came back from host memory.
    """

    captured: int = 0
    shared: int = 0
    evicted: int = 0
    refused: int = 0
    restored: int = 0


class SinkStore:
    """Sets of sink rows, keyed by the tokens they hold, kept by least recent use.

    Args:
        capacity: most sets.
        sink_tokens: w_sink, slots of a set.
        request_rows: rows of SGLang's req_to_token table.
        device: where the tables live.
        source: where slots come from.

    Attributes:
        set_of: int32 [request_rows], set index of the request in that row of req_to_token, or -1.
        slots_of: int32 [capacity, w_sink], streaming slots of a set.
        weights: counts the changes of the model's weights.
        host: copies in host memory, or None.
    """

    def __init__(
        self, capacity: int, sink_tokens: int, request_rows: int, device: str, source: SlotSource
    ) -> None:
        self.capacity = capacity
        self.sink_tokens = sink_tokens
        self.device = device
        self.set_of = torch.full((request_rows,), NO_SET, dtype=torch.int32, device=device)
        self.slots_of = torch.zeros((capacity, sink_tokens), dtype=torch.int32, device=device)
        self._source = source
        self._slots_of_set = -(-sink_tokens // source.page_size) * source.page_size
        self.stats = SinkStats()
        self.weights = 0
        self.host: HostSets | None = None
        self._sets: OrderedDict[SinkKey, SinkSet] = OrderedDict()
        self._free = list(range(capacity - 1, -1, -1))
        self._of_request: dict[str, SinkSet] = {}
        self._promised: set[SinkKey] = set()
        self._refused: set[str] = set()  # of the running ones; each asks again and again, and counts once
        self._row_of_request: dict[str, Callable[[], int | None]] = {}
        self._pending_rows: list[tuple[Callable[[], int | None], int]] = []
        self._pending_copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # With HiCache: a set's rows, and the host set they are read from, or the key of the one they go to.
        self._pending_restores: dict[int, tuple[torch.Tensor, int]] = {}
        self._pending_backups: dict[int, tuple[torch.Tensor, SinkKey]] = {}

    def __contains__(self, key: SinkKey) -> bool:
        return key in self._sets

    def touch(self, key: SinkKey) -> bool:
        """Whether ``key`` is stored; if so it becomes the most recently used."""
        if not self.sink_tokens:
            return True
        if key not in self._sets:
            return False
        self._sets.move_to_end(key)
        if self.host is not None:
            self.host.touch(key)
        return True

    def on_host(self, key: SinkKey) -> bool:
        """Whether host memory has a copy of ``key``."""
        return self.host is not None and key in self.host

    def restore(self, key: SinkKey) -> bool:
        """Bring ``key``, which was dropped, back from the host; False if it has none or no slot is left."""
        if self.host is None or key not in self.host:
            return False
        taken = self._take()
        if taken is None:
            return False
        entry = SinkSet(taken[0], key, taken[1])
        self._sets[key] = entry
        self._pending_restores[entry.index] = self._rows_of(entry), self.host.find(key)
        self.stats.restored += 1
        return True

    def promise(self, key: SinkKey) -> None:
        """A request that was admitted will adopt ``key``: until ``settle`` it is not dropped for others.

        SGLang may evict in between, for requests that it preempts in the same pass.
        """
        self._promised.add(key)

    def settle(self) -> None:
        """Those that were admitted have adopted their sets."""
        self._promised.clear()

    def holds(self, request: str) -> bool:
        """Whether ``request`` already uses a set, or needs none because w_sink is 0."""
        return not self.sink_tokens or request in self._of_request

    def adopt(self, request: str, key: SinkKey, row: Callable[[], int | None]) -> bool:
        """Let ``request`` use the stored set ``key``; False if there is none.

        row: called at the next flush for the request's row of req_to_token; None means the request
        is gone by then.
        """
        if self.holds(request):
            return True
        if not self.touch(key):
            return False
        entry = self._sets[key]
        if self.host is not None and key not in self.host:  # others took its place
            self._copy_to_host(entry)
        self._bind(request, entry, row)
        self.stats.shared += 1
        return True

    def capture(
        self,
        request: str,
        key: SinkKey,
        row: Callable[[], int | None],
        slots: Callable[[], torch.Tensor],
        *,
        kept: bool = True,
    ) -> bool:
        """Let ``request`` use the set ``key``, filling it from ``slots`` if it is new.

        slots: called at most once, at once; returns int64 [w_sink], the streaming slots that hold
        positions 0 .. w_sink - 1 now. They may be freed as soon as this returns.
        kept: whether a new set stays stored once no request uses it.

        Returns False, and changes nothing, if neither a free slot nor an unused set is left: the caller must
        then keep the slots themselves.
        """
        if self.adopt(request, key, row):
            return True
        taken = self._take()
        if taken is None:
            if request not in self._refused:
                self._refused.add(request)
                self.stats.refused += 1
            return False
        entry = SinkSet(taken[0], key, taken[1], kept)
        self._sets[key] = entry
        # Rows, since another token may soon own the slots, and their units.
        self._pending_copies[entry.index] = self._rows_of(entry), self._source.rows_in_parts(slots())
        self._copy_to_host(entry)
        self._bind(request, entry, row)
        self.stats.captured += 1
        return True

    def release(self, request: str) -> None:
        """``request`` ends or gives its row back; a kept set stays stored for requests that begin alike."""
        self._refused.discard(request)
        entry = self._of_request.pop(request, None)
        if entry is None:
            return
        entry.users.discard(request)
        if not entry.kept and not entry.users:
            self._drop(entry)
        bound = self._row_of_request.pop(request)
        # If it comes back before the next flush (a retraction), its new row must not get the old set.
        self._pending_rows = [pending for pending in self._pending_rows if pending[0] is not bound]
        row = bound()
        if row is not None:
            self._pending_rows.append((lambda: row, NO_SET))

    def clear(self) -> None:
        """Forget every set that no request uses (the prefix cache was flushed)."""
        for entry in [entry for entry in self._sets.values() if not entry.users]:
            self._drop(entry)
        if self.host is not None:
            self.host.clear()

    def trim(self, keep: int, until: Callable[[], bool] = lambda: False) -> None:
        """Drop unused sets, longest unused first, down to ``keep`` of them, or until ``until`` is true."""
        unused = list(self._droppable())
        for entry in unused[: max(len(unused) - keep, 0)]:
            if until():
                return
            self._drop(entry)
            self.stats.evicted += 1

    def flush(self, copy_rows: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        """Do the queued device work on the current stream.

        copy_rows: ``copy_rows(target, source)`` with int64 rows, for K and V; reads all before it writes.
        """
        self.flush_copies(copy_rows)
        if self._pending_rows:
            rows: dict[int, int] = {}
            for resolve, index in self._pending_rows:
                row = resolve()
                if row is not None:
                    rows[row] = index
            self._pending_rows.clear()
            set_rows(self.set_of, rows)

    def flush_copies(self, copy_rows: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        """As ``flush``, but leaves requests where they point."""
        if self._pending_copies:
            pending, self._pending_copies = self._pending_copies, {}
            for pair in pending.values():
                for side in pair:
                    _used_here(side)
            target, source = (torch.stack(side) for side in zip(*pending.values(), strict=True))
            self._publish(list(pending), target)
            copy_rows(target.flatten(), source.flatten())
        if self._pending_restores:  # after the copies, whose sources they may overwrite
            assert self.host is not None
            restores, self._pending_restores = self._pending_restores, {}
            rows = [_used_here(at) for at, _ in restores.values()]
            self._publish(list(restores), torch.stack(rows))
            self.host.restore([index for _, index in restores.values()], rows)
        if self._pending_backups:  # after the restores, which may read what they overwrite
            assert self.host is not None
            backups, self._pending_backups = self._pending_backups, {}
            # Later ones may have taken a host set from an earlier one.
            kept = [(self.host.find(key), at) for at, key in backups.values() if key in self.host]
            if kept:
                self.host.back_up([index for index, _ in kept], [_used_here(at) for _, at in kept])

    def _publish(self, sets: list[int], rows: torch.Tensor) -> None:
        """``rows`` (int64 [sets, units, w_sink]) are where ``sets`` are."""
        indices = torch.tensor(sets, dtype=torch.int64).to(self.device, non_blocking=True)
        self.slots_of[indices] = rows[:, 0].to(torch.int32)

    def _copy_to_host(self, entry: SinkSet) -> None:
        if self.host is not None and entry.kept:
            self.host.keep(entry.key)
            self._pending_backups[entry.index] = self._rows_of(entry), entry.key

    def _rows_of(self, entry: SinkSet) -> torch.Tensor:
        return self._source.rows_in_parts(entry.slots[: self.sink_tokens])

    @property
    def used(self) -> int:
        """Sets that hold sinks, in use or kept for later."""
        return len(self._sets)

    @property
    def unused(self) -> int:
        """Sets kept for later."""
        return self.used - self.in_use

    @property
    def droppable(self) -> int:
        """Sets that can go: no request uses them, and none was promised them."""
        return sum(1 for _ in self._droppable())

    @property
    def slots_of_set(self) -> int:
        """Slots that a set takes, whole pages."""
        return self._slots_of_set

    @property
    def in_use(self) -> int:
        """Sets that running requests use."""
        return sum(1 for entry in self._sets.values() if entry.users)

    @property
    def requests(self) -> int:
        """Running requests that use a set."""
        return len(self._of_request)

    def check_integrity(self) -> list[str]:
        """What is wrong with the store, one sentence each; empty when all is well."""
        wrong = []
        indices = sorted([entry.index for entry in self._sets.values()] + self._free)
        if indices != list(range(self.capacity)):
            wrong.append(f"sink sets are lost or doubled: {len(indices)} accounted of {self.capacity}")
        for key, entry in self._sets.items():
            if entry.key != key:
                wrong.append(f"sink set {entry.index} is filed under another key")
            if not entry.kept and not entry.users:
                wrong.append(f"sink set {entry.index} is kept although nobody uses it")
            for request in entry.users:
                if self._of_request.get(request) is not entry:
                    wrong.append(f"sink set {entry.index} counts request {request}, which does not use it")
        for request, entry in self._of_request.items():
            if request not in entry.users:
                wrong.append(f"request {request} uses sink set {entry.index}, which does not count it")
        return wrong

    def _bind(self, request: str, entry: SinkSet, row: Callable[[], int | None]) -> None:
        entry.users.add(request)
        self._of_request[request] = entry
        self._row_of_request[request] = row
        self._pending_rows.append((row, entry.index))

    def _droppable(self) -> Iterator[SinkSet]:
        """Sets that no request uses or will use, the longest unused first."""
        return (e for e in self._sets.values() if not e.users and e.key not in self._promised)

    def _take(self) -> tuple[int, torch.Tensor] | None:
        """An index and slots for a new set, in place of the longest unused ones if there is no room."""
        while True:
            slots = self._source.alloc(self._slots_of_set) if self._free else None
            if slots is not None:
                # A copy: a slice would keep the whole list of free units that it was cut from.
                return self._free.pop(), slots.clone()
            entry = next(self._droppable(), None)
            if entry is None:
                return None
            self._drop(entry)
            self.stats.evicted += 1

    def _drop(self, entry: SinkSet) -> None:
        del self._sets[entry.key]
        self._pending_copies.pop(entry.index, None)
        self._pending_restores.pop(entry.index, None)
        if self._pending_backups.pop(entry.index, None) is not None and self.host is not None:
            self.host.forget(entry.key)
        self._source.free_segment(entry.slots, start_pos=0)
        self._free.append(entry.index)


def _used_here(rows: torch.Tensor) -> torch.Tensor:
    """``rows``, which were made on the scheduler's stream and are read on this one."""
    if rows.is_cuda:
        rows.record_stream(torch.cuda.current_stream(rows.device))
    return rows
