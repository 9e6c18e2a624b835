"""How long pieces of work take on a device, measured without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class Stopwatch:
    """Sums the seconds between entering and leaving it, again and again; not nested.

    On a GPU it records two events on the current stream, whose times are read once both have passed. Events
    are used again, so there are never more than the device is behind. On a CPU it reads the clock.

    Args:
        new_event: makes an event that takes the time; None on a CPU.
    """

    def __init__(self, new_event: Callable[[], Any] | None) -> None:
        self._new_event = new_event
        self._seconds = 0.0
        self._began: Any = None
        self._running: deque[tuple[Any, Any]] = deque()
        self._free: list[Any] = []

    @classmethod
    def of(cls, device: torch.device) -> Stopwatch:
        """One for work on ``device``."""
        return cls((lambda: torch.cuda.Event(enable_timing=True)) if device.type == "cuda" else None)

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        if self._new_event is None:
            self._seconds += self._now() - self._began
        else:
            self._running.append((self._began, self._now()))

    def read(self) -> float:
        """Seconds so far, of the pieces that the device has done; does not wait for the others."""
        while self._running and self._running[0][1].query():
            began, ended = self._running.popleft()
            self._seconds += began.elapsed_time(ended) / 1000
            self._free += (began, ended)
        return self._seconds

    def _now(self) -> Any:
        if self._new_event is None:
            return time.perf_counter()
        if not self._free:
            self.read()
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event
