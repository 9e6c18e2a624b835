"""lt_sglang.identify.stopwatch: on a clock, and on a device that is behind."""

from __future__ import annotations

import random

import pytest
import torch

from lt_sglang.identify import stopwatch
from lt_sglang.identify.stopwatch import Stopwatch


class Device:
    """Events are recorded at ``now`` and pass when the device gets there; milliseconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done = 0.0
        self.events = 0

    def event(self) -> Event:
        self.events += 1
        return Event(self)


class Event:
    """What Stopwatch uses of torch.cuda.Event."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.at = 0.0

    def record(self) -> None:
        self.at = self.device.now

    def query(self) -> bool:
        return self.device.done >= self.at

    def elapsed_time(self, later: Event) -> float:
        assert self.query() and later.query(), "would wait for the device"
        return later.at - self.at


def test_counts_what_the_device_has_done_and_waits_for_nothing() -> None:
    device = Device()
    watch = Stopwatch(device.event)
    for start, end in ((0, 3), (10, 12), (20, 27)):
        device.now = start
        with watch:
            device.now = end
    assert watch.read() == 0
    device.done = 15
    assert watch.read() == watch.read() == pytest.approx(0.005)
    device.done = 26
    assert watch.read() == pytest.approx(0.005)
    device.done = 27
    assert watch.read() == pytest.approx(0.012)


def test_holds_no_more_events_than_the_device_is_behind() -> None:
    """Nobody reads it without --enable-metrics."""
    rng = random.Random(0)
    device, behind = Device(), 40.0
    watch, total = Stopwatch(device.event), 0.0
    for _ in range(2000):
        device.now += 5
        device.done = max(device.now - behind, device.done)
        took = rng.random()
        with watch:
            device.now += took
        total += took
    assert device.events <= 2 * (behind / 5 + 2)
    device.done = device.now
    assert watch.read() == pytest.approx(total / 1000)


def test_a_cpu_has_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((1.0, 1.5, 4.0, 4.25))
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(times))
    watch = Stopwatch.of(torch.device("cpu"))
    for _ in range(2):
        with watch:
            pass
    assert watch.read() == 0.75
