"""Any order of events over the real caches: nobody loses a slot, and nobody reads another's rows.

``LT_STEPS`` sets how many steps all machines take at least, ``LT_SEED`` where they begin.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sglang.srt.managers.io_struct import PositionalEmbeds

from tests.property.cpu import Sizes, request
from tests.property.scheduler import Scheduler

STEPS = int(os.environ.get("LT_STEPS", "10000"))
SEED = int(os.environ.get("LT_SEED", "0")) or random.randrange(1, 1 << 30)
# A mutant is killed by a failure, whatever its smallest example is.
PHASES = (Phase.generate,) if os.environ.get("LT_NO_SHRINK") else (Phase.generate, Phase.shrink)

SIZES = {
    # Memory for the longest request and a chunk, or a little more.
    "static": [Sizes(), Sizes(sink=4, recent=5, rows=4), Sizes(sink=0, recent=7), Sizes(sink=1, recent=1)],
    "few sink sets": [Sizes(sets=1), Sizes(sets=3, sink=4, recent=4)],
    "no tree": [Sizes(disable=True), Sizes(disable=True, sink=3, recent=4, sets=6)],
    # Tokens of more than one unit, none of a full layer, or at most so many.
    "shapes": [
        Sizes(full=1, lazy=3, units=560),
        Sizes(full=3, lazy=1, units=450),
        Sizes(full=2, lazy=3, units=700),
        Sizes(full=0, lazy=2, units=150, limit=300),
        Sizes(limit=110, units=300),
    ],
    "pages": [
        Sizes(page=4, chunk=12, units=80),
        Sizes(page=16, chunk=32, units=30, sink=3),
        Sizes(page=4, chunk=12, units=260, full=2, lazy=3, sink=0),
        Sizes(page=4, chunk=12, units=100, sink=5, recent=9, disable=True),
        # Units of 16 without sinks; the window lies in two pages or three.
        Sizes(page=16, chunk=32, units=30, sink=0, recent=20),
    ],
    "dynamic": [
        Sizes(dynamic=True),
        Sizes(dynamic=True, sink=4, recent=5, layer_sets=7, units=260),
        Sizes(dynamic=True, full=1, lazy=2, units=390),
        Sizes(dynamic=True, page=4, chunk=12, units=80),
        Sizes(dynamic=True, page=16, chunk=32, units=36, sink=3, recent=20),
        Sizes(dynamic=True, listed=True, layer_sets=8, units=260),
    ],
}


class Machine(RuleBasedStateMachine):
    """What clients and the scheduler do, in any order.

    sizes: one of them is chosen at the start. make: the scheduler.
    """

    make: type[Scheduler] = Scheduler
    sizes: list[Sizes]
    steps: Counter[str]
    events: Counter[str]

    @initialize(data=st.data(), overlap=st.booleans())
    def start(self, data: st.DataObject, overlap: bool) -> None:
        self.scheduler = self.make(data.draw(st.sampled_from(self.sizes)), overlap)
        self.count = 0

    @rule(
        trunk=st.integers(0, 2),
        shared=st.integers(1, 50),
        own=st.lists(st.integers(0, 4), max_size=8),
        output=st.integers(1, 24),
        tenant=st.sampled_from([(None, None)] * 4 + [("key", None), (None, "salt")]),
        kind=st.sampled_from(["plain"] * 5 + ["asks", "barred", "overrides", "embeds"]),
        times=st.integers(1, 3),
    )
    def submit(
        self,
        trunk: int,
        shared: int,
        own: list[int],
        output: int,
        tenant: tuple[str | None, str | None],
        kind: str,
        times: int,
    ) -> None:
        """Prompts that begin like others, of the same tenant or of another.

        kind: barred from the tree, which then neither finds nor keeps it; with vectors in place of some
        tokens, or of all, which SGLang takes without a tree only.
        """
        prompt = [(trunk + position * position) % 11 for position in range(shared)] + own
        key, salt = tenant
        for _ in range(times):
            self.count += 1
            # An id comes back, with another request behind it.
            req = request(
                f"r{self.count % 3}", prompt, output, kind == "asks", extra_key=key, cache_salt=salt
            )
            secret = 0
            if kind in ("overrides", "embeds"):
                secret = self.count
            if kind == "embeds" and self.scheduler.caches.sizes.disable:
                req.input_embeds = [[0.5]] * len(prompt)
            elif kind in ("overrides", "embeds"):
                req.positional_embed_overrides = PositionalEmbeds(torch.ones(1, 1), [0])
            req.skip_radix_cache_insert = kind in ("overrides", "embeds", "barred")
            self.scheduler.submit(req, secret)

    @precondition(lambda self: self.scheduler.ended)
    @rule(data=st.data(), own=st.lists(st.integers(0, 4), min_size=1, max_size=9), output=st.integers(1, 9))
    def next_turn(self, data: st.DataObject, own: list[int], output: int) -> None:
        """A conversation goes on."""
        last = data.draw(st.sampled_from(list(self.scheduler.ended.values())))
        prompt = [*last.origin_input_ids, *last.output_ids, *own]
        if len(prompt) <= 70:
            self.count += 1
            again = request(f"t{self.count}", prompt, output, extra_key=last.extra_key)
            again.cache_salt = last.cache_salt
            self.scheduler.submit(again)

    @rule(times=st.integers(1, 4), prefill=st.sampled_from([True, True, False]))
    def step(self, times: int, prefill: bool) -> None:
        for _ in range(times):
            self.scheduler.step(prefill)
            self.scheduler.check()

    @precondition(lambda self: self.scheduler.known)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.abort(data.draw(st.sampled_from(list(self.scheduler.known.values()))))

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        self.scheduler.retract(data.draw(st.sampled_from(self.scheduler.running)))

    @precondition(lambda self: not self.scheduler.caches.sizes.disable)
    @rule(full=st.integers(0, 60), streaming=st.integers(0, 20))
    def evict(self, full: int, streaming: int) -> None:
        self.scheduler.evict(full, streaming)

    @precondition(lambda self: not self.scheduler.caches.sizes.disable)
    @rule(tokens=st.integers(1, 240))
    def preempt(self, tokens: int) -> None:
        """SGLang evicts in the pass that admits, for requests that it preempts (release_req)."""
        self.scheduler.preempts = tokens

    @precondition(lambda self: not self.scheduler.caches.sizes.disable)
    @rule()
    def touch(self) -> None:
        self.scheduler.touch()

    @precondition(lambda self: self.count % 7 == 3)
    @rule()
    def update_weights(self) -> None:
        """Flushed if nothing is there, else in place."""
        self.scheduler.update_weights(flush=self.scheduler.idle)

    @invariant()
    def check(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            self.steps["steps"] += 1

    def teardown(self) -> None:
        """All ends, and everything is back."""
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        while not scheduler.idle:
            left = len(scheduler.known)
            for _ in range(400):
                scheduler.step()
            now = len(scheduler.known), len(scheduler.waiting), len(scheduler.running)
            assert now[0] < left or scheduler.idle, f"stuck: of {now[0]} {now[1]} wait, {now[2]} run"
        scheduler.check()
        scheduler.clear_all()
        self.events.update(scheduler.events)


@pytest.mark.parametrize("name", SIZES)
def test_any_order_of_events(
    name: str, capsys: pytest.CaptureFixture[str], record_property: pytest.RecordProperty
) -> None:
    begin, record = time.perf_counter(), partial(record_property, "seed")
    steps, events, last = drive(Machine, SIZES[name], STEPS // len(SIZES), record)
    expected = {"finished", "decode", "retracted", "aborted", "miss"}
    expected |= set() if name == "no tree" else {"hit", "long hit"}
    expected |= {"STAGED", "SELECT"} if name == "dynamic" else set()
    assert not [event for event in expected if not events[event]], "steps that show nothing"
    with capsys.disabled():
        took = time.perf_counter() - begin
        print(f"\n{name}: {steps} steps, seeds {SEED} to {last}, {took:.0f} s, {dict(events)}")


def drive(
    machines: type[Machine], sizes: list[Sizes], least: int, record: Callable[[int], None]
) -> tuple[int, Counter[str], int]:
    """Run machines until they took ``least`` steps. Steps, events, and the last seed."""
    steps, events = Counter[str](), Counter[str]()
    number = SEED
    record(SEED)
    while steps["steps"] < least:
        fields = {"sizes": sizes, "steps": steps, "events": events}
        machine = seed(number)(type("Machine", (machines,), fields))
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=20,
                stateful_step_count=60,
                deadline=None,
                database=None,
                phases=PHASES,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )
        number += 1
    return steps["steps"], events, number - 1
