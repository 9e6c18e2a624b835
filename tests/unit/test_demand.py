"""lt_sglang.memory.demand: what admission goes by, against what a request really holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from lt_sglang.memory.budget import running_offset
from lt_sglang.memory.demand import UNNAMED_OUTPUT, Demand, expected_output
from lt_sglang.memory.units import UnitShape

from .life_rig import DynamicRig, Rig

SHAPES = [
    UnitShape(1, 1),
    UnitShape(16, 16),
    UnitShape(2, 6),
    UnitShape(6, 2),
    UnitShape(2, 3),
    UnitShape(0, 4),
]
PLAIN = Demand(UnitShape(1, 1), 1, window=10, interval=1, chunk=8, context=10_000)


def demands(seed: int, count: int) -> Iterator[tuple[random.Random, Demand]]:
    rng = random.Random(seed)
    for _ in range(count):
        demand = Demand(
            rng.choice(SHAPES),
            rng.choice([1, 4, 16]),
            window=rng.randint(2, 60),
            interval=rng.choice([1, 8, 24]),
            chunk=rng.choice([16, 32, 64]),
            context=10_000,
            sink_tokens=rng.choice([0, 4]),
        )
        yield rng, demand.undecided_up_to(rng.choice([0, 0, rng.randint(1, 200)]))


def held(demand: Demand, prompt: int, output: int) -> list[tuple[int, int]]:
    """Tokens held in (full, lazy) layers, step by step: prefill chunks, then one decoded token at a time.

    A window slides behind every chunk of a request whose layers are known, and whenever ``interval`` tokens
    were decoded; the first such slide behind ``window`` of them lets the prompt's own window go.
    """
    steps, done, kept, known = [], 0, 0, not demand.undecided
    while done < prompt:
        new = min(demand.chunk, prompt - done)
        kept, done = kept + new, done + new
        steps.append((done, kept))
        known = known or done >= prompt or done > demand.undecided
        if known:
            kept = min(kept, demand.window)
    own = 0
    for step in range(1, output + 1):
        if step % demand.interval == 0:
            own = min(own, demand.window - 1)
            if step >= demand.window:
                kept = 0
        own += 1
        steps.append((prompt + step, kept + own))
    return steps


def units_of(demand: Demand, full: int, streaming: int) -> int:
    return demand.shape.units(-(-full // demand.page_size), -(-streaming // demand.page_size))


def page_of_each(demand: Demand) -> int:
    return demand.shape.full_units + demand.shape.streaming_units


def test_of_a_new_request_never_less_than_it_holds_and_a_page_more() -> None:
    for rng, demand in demands(1, 600):
        prompt, output = rng.randint(1, 300), rng.randint(0, 200)
        peak = max(units_of(demand, *step) for step in held(demand, prompt, output))
        sinks = units_of(demand, 0, demand.sink_tokens)
        found = demand.of_new(prompt, output)
        # When the window slides is known to an interval, and how long the last chunk is only to a chunk.
        slack = page_of_each(demand) + units_of(demand, 0, demand.interval + -prompt % demand.chunk)
        slack += units_of(demand, demand.chunk, demand.chunk) if demand.undecided else 0
        assert peak + sinks + page_of_each(demand) <= found, (demand, prompt, output)
        assert found <= peak + sinks + page_of_each(demand) + slack, (demand, prompt, output)


def test_of_a_running_request_never_less_than_it_will_take() -> None:
    for rng, demand in demands(2, 600):
        prompt, output = rng.randint(1, 300), rng.randint(1, 200)
        decode = held(demand, prompt, output)[-output:]
        done = rng.randrange(output)
        now = decode[done - 1] if done else (prompt, min(prompt, demand.window))
        taken = max(units_of(demand, *step) for step in decode[done:]) - units_of(demand, *now)
        slid = done - done % demand.interval
        returned = min(prompt, demand.window) if slid < demand.window else 0
        found = demand.of_running(now[1] - returned, output - done, returned)
        assert found >= taken, (demand, prompt, output, done)
        slack = 2 * page_of_each(demand) + units_of(demand, demand.interval, demand.interval)
        assert found <= max(taken, 0) + slack, (demand, prompt, output, done)


def test_more_is_never_less() -> None:
    for rng, demand in demands(3, 300):
        prompt, output = rng.randint(1, 300), rng.randint(0, 300)
        assert demand.of_new(prompt, output) <= demand.of_new(prompt + 1, output)
        assert demand.of_new(prompt, output) <= demand.of_new(prompt, output + 1)
        assert demand.of_new(prompt, output) <= replace(demand, undecided=500).of_new(prompt, output)
        own = rng.randint(0, 200)
        assert demand.of_running(own, output, prompt) <= demand.of_running(own, output + 1, prompt)
        assert demand.of_running(own, output, prompt) <= demand.of_running(own, output)


def test_a_short_request_by_hand() -> None:
    """Full, lazy, and a page of each."""
    # At the end of the prefill: the window and the chunk.
    assert PLAIN.of_new(20, 0) == PLAIN.of_new(20, 3) == 20 + 18 + 2
    # A few tokens beside the prompt's window of 10.
    assert PLAIN.of_new(20, 9) == 29 + 19 + 2
    # A long output: the prompt's window goes, its own stays.
    assert PLAIN.of_new(20, 100) == 120 + 11 + 2
    assert replace(PLAIN, sink_tokens=4).of_new(20, 3) == 44
    assert PLAIN.undecided_up_to(100).of_new(20, 3) == 20 + 20 + 2
    assert PLAIN.undecided_up_to(7).of_new(20, 3) == 40, "15 + 15 undecided are less than all of it"
    assert PLAIN.of_running(0, 3, 10) == 3 + 3 + 2
    assert PLAIN.of_running(0, 90, 10) == 90 + 1 + 2, "at the end; the prompt's window has been let go"
    assert PLAIN.of_running(10, 3) == 3 + 1 + 2
    assert replace(PLAIN, sink_tokens=4).of_running(10, 3, new_sinks=True) == 3 + 1 + 2 + 4
    # Others decode while one is prefilled.
    assert PLAIN.of_decoding(20, 3) == 23 + 13 + 2
    wide = replace(PLAIN, interval=8)
    assert wide.of_running(10, 30) == 30 + 8 + 2, "it has just slid"
    assert wide.of_running(16, 30) == 30 + 2 + 2, "in two tokens it will"


def test_no_full_layer_costs_no_units_of_full_slots() -> None:
    demand = replace(PLAIN, shape=UnitShape(0, 4))
    assert demand.of_new(5000, 3) == 18 + 1
    assert demand.longest(1000, 12345) == demand.context
    assert demand.longest(1000, 700) == 700


def test_to_and_from_plain_values() -> None:
    for _, demand in demands(4, 20):
        assert Demand.from_dict(demand.to_dict()) == demand


def test_the_longest_request_is_admitted() -> None:
    """And one token more is not, where full slots are units."""
    for _, demand in demands(5, 400):
        for units in (500, 3000, 20_000):
            longest = demand.longest(units, 10**9)
            if longest <= 0:
                continue
            for output in (0, longest // 3, longest - 1):
                assert demand.of_new(longest - output, output) <= units, (demand, units, longest, output)


def test_the_longest_is_bound_by_full_slots_and_never_negative() -> None:
    assert PLAIN.longest(10_000, 123) == 123
    assert PLAIN.longest(0, 123) == PLAIN.longest(-5, 123) == 0


LIVES = [
    {},
    {"page": 4, "chunk": 32},
    {"page": 16, "chunk": 32, "window": 47},
    {"shape": UnitShape(1, 3)},
    {"shape": UnitShape(3, 1), "page": 4},
    {"shape": UnitShape(3, 2), "interval": 24, "sinks": 0},
    {"disabled": True},
]


@pytest.mark.parametrize("given", LIVES, ids=str)
@pytest.mark.parametrize("undecided", [None, "prompt", 64])
def test_the_longest_request_lives_from_its_first_chunk_to_its_last_token(
    given: dict[str, object], undecided: str | int | None
) -> None:
    """A third of it is output. It is admitted, is never parked, and never runs out of memory."""
    units = 900 * UnitShape(1, 1).parts if given.get("page", 1) == 1 else 220
    units *= 3 if "shape" in given else 1
    probe = Rig(units, **given).allocator.demand  # type: ignore[arg-type]
    if undecided is None:
        made: Rig = Rig(units, **given)  # type: ignore[arg-type]
    else:
        limit = probe.undecided_limit(units) if undecided == "prompt" else int(undecided)
        made = DynamicRig(units, undecided=limit, **given)  # type: ignore[arg-type]
    longest = made.allocator.demand.longest(units, made.allocator.size_full)
    assert longest > 3 * made.chunk
    output = longest // 3
    req = made.request(range(1000, 1000 + longest - output), output)
    assert made.prefill(req), "the longest request does not start, or is parked"
    assert made.decode(req, output - 1), "the longest request runs out of memory"
    made.check()
    assert made.most <= units
    made.finish(req)
    made.check()
    again = made.request(range(5000, 5000 + longest - 2), 2)
    assert made.prefill(again) and made.decode(again, 1), "what it left in the cache is in the way"


@pytest.mark.parametrize("seed", range(4))
def test_what_requests_really_hold(seed: int) -> None:
    """of_new against the units that a real tree and allocator have given out, at their peak."""
    rng = random.Random(seed)
    for _ in range(6):
        page = rng.choice([1, 1, 4, 16])
        shape = rng.choice(SHAPES[:1] + SHAPES[2:])
        window, interval = rng.randint(max(3, page), 40), rng.choice([1, 8])
        kind = rng.choice([Rig, DynamicRig]) if shape.full_layers else Rig
        made = kind(
            6000,
            window=window,
            interval=interval,
            shape=shape,
            page=page,
            chunk=32,
            context=2000,
            limit=None if shape.full_layers else 4000,
        )
        prompt, output = rng.randint(1, 150), rng.randint(1, 80)
        demand = made.allocator.demand
        req = made.request([rng.randrange(1000) for _ in range(prompt)], output)
        expected = demand.of_new(prompt, output)
        assert made.prefill(req)
        while len(req.output_ids) < output:
            before = made.units_used
            coming = running_offset(req, 1.0, made.allocator) * demand.both / page
            left, made.most = made.most, 0
            count = min(rng.randint(1, 30), output - len(req.output_ids))
            assert made.decode(req, count)
            # SGLang keeps a window of whole pages, and frees whole pages.
            coming += 2 * shape.streaming_units if page > 1 else 0
            assert made.most <= before + coming, (page, shape, window, interval, prompt, output)
            made.most = max(made.most, left)
        # The tree locks whole nodes: one may begin before the window of a prompt whose last chunk is shorter.
        node = demand.units(0, window) if prompt > 32 and 0 < prompt % 32 <= window else 0
        node += 2 * shape.streaming_units if page > 1 else 0
        assert made.most <= expected + node, (page, shape, window, interval, prompt, output)


@pytest.mark.parametrize("mode", ["static", "dynamic", "early"])
@pytest.mark.parametrize("page", [1, 4])
def test_a_running_request_never_takes_more_than_it_is_reckoned_with(page: int, mode: str) -> None:
    """At each of its steps, wherever chunks left its window, published or not: so that none is thrown out."""
    rng = random.Random(page)
    for _ in range(60):
        given: dict[str, Any] = {
            "window": rng.choice([15, 31, 47]) if page > 1 else rng.choice([15, 31, 40]),
            "chunk": rng.choice([16, 32, 64]),
            "interval": page * rng.choice([1, 2, 6]) if page > 1 else rng.choice([1, 8, 24]),
            "shape": rng.choice([UnitShape(1, 1), UnitShape(1, 3), UnitShape(3, 1), UnitShape(3, 2)]),
            "page": page,
            "disabled": rng.random() < 0.2,
            "sets": rng.choice([0, 8, 8]),
        }
        undecided = {"dynamic": 2000, "early": 64}
        made = (
            Rig(12_000, **given)
            if mode == "static"
            else DynamicRig(12_000, undecided=undecided[mode], **given)
        )
        prompt, output = rng.randint(1, 300), rng.randint(2, 150)
        req = made.request(range(1000, 1000 + prompt), output, barred=rng.random() < 0.2)
        assert made.prefill(req)
        used, reckoned = [], []
        for _ in range(output - 1):
            used.append(made.units_used)
            reckoned.append(running_offset(req, 1.0, made.allocator) * made.allocator.demand.both / page)
            assert made.decode(req, 1)
        used.append(made.units_used)
        for step, coming in enumerate(reckoned):
            # Without a free set the window stays; that is known once it is late to go.
            if given["sets"] or step > given["window"] + 1 + given["interval"]:
                taken = max(used[step:]) - used[step]
                assert taken <= coming, (given, prompt, output, step)


@pytest.mark.parametrize("kind", [Rig, DynamicRig])
@pytest.mark.parametrize("shared", [20, 31, 200])
@pytest.mark.parametrize("own", [1, 10, 50])
def test_a_shared_window_comes_back_once(kind: type[Rig], shared: int, own: int) -> None:
    """Eight requests of one beginning, reckoned together: the tree holds that window for all of them."""
    made = kind(12_000, window=31, interval=8)
    output = 120
    reqs = [
        made.request([*range(1000, 1000 + shared), *range(5000 + 100 * at, 5000 + 100 * at + own)], output)
        for at in range(8)
    ]
    assert all(made.prefill(req) for req in reqs)
    both = made.allocator.demand.both
    used, reckoned = [], []
    for _ in range(output - 1):
        used.append(made.units_used)
        reckoned.append(sum(running_offset(req, 1.0, made.allocator) * both for req in reqs))
        assert all(made.decode(req, 1) for req in reqs)
    used.append(made.units_used)
    for step, coming in enumerate(reckoned):
        assert max(used[step:]) - used[step] <= coming, step


@pytest.mark.parametrize(
    ("remaining", "ratio", "named", "expected"),
    [
        (10_000, 1.0, True, 10_000),
        (10_000, 0.5, True, 5000),
        (10_000, 1.0, False, UNNAMED_OUTPUT),
        (100, 1.0, False, 100),
        (100, 0.7, False, 70),
        (-3, 1.0, True, 0),
        (-3, 1.0, False, 0),
    ],
)
def test_expected_output(remaining: int, ratio: float, named: bool, expected: int) -> None:
    assert expected_output(remaining, ratio, named=named) == expected


def test_what_is_unnamed_is_what_sglang_reckons() -> None:
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

    assert UNNAMED_OUTPUT == CLIP_MAX_NEW_TOKENS
