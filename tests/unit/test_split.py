"""lt_sglang.memory.split: the KV budget, by seeded random cases."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.memory.split import (
    MAX_VIRTUAL_TOKENS,
    SPARE_SINK_SETS,
    PoolSplit,
    SplitInput,
    split_budget,
    split_bytes,
    split_tokens,
)

MISTRAL = SplitInput(
    full_bytes=16 * 4096,
    streaming_bytes=16 * 4096,
    retained_tokens=1020,
    sink_tokens=4,
    expected_tokens=16384,
    chunk_tokens=8192,
    context_tokens=32768,
)


def cases(seed: int, count: int, all_lazy: bool = False) -> Iterator[tuple[int, SplitInput]]:
    rng = random.Random(seed)
    for _ in range(count):
        layers = rng.randrange(1, 80)
        lazy = layers if all_lazy else rng.randrange(1, layers + 1)
        token_layer = rng.choice([256, 512, 4096])
        recent, sinks = rng.randrange(1, 3000), rng.choice([0, 1, 4, 129, 2000])
        context = rng.randrange(2048, 200_000)
        given = SplitInput(
            full_bytes=(layers - lazy) * token_layer,
            streaming_bytes=lazy * token_layer,
            retained_tokens=max(recent, sinks, 2),
            sink_tokens=sinks,
            expected_tokens=rng.choice([rng.randrange(1, 64), rng.randrange(1, context)]),
            chunk_tokens=rng.randrange(64, 16384),
            context_tokens=context,
            expected_output_tokens=rng.choice([None, 0, rng.randrange(1, 4096)]),
            eviction_interval=rng.choice([1, 128]),
        )
        yield rng.randrange(1 << 24, 1 << 38), given


def longest(split: PoolSplit, given: SplitInput) -> int:
    """What a request that takes the whole full pool holds in the streaming pool, without its chunk."""
    return min(split.full_tokens, given.context_tokens, given.streaming_longest)


@pytest.mark.parametrize(
    ("output", "interval", "slots"),
    [
        # Not known: a quarter of a window.
        (None, 128, 1020 + 255),
        (None, 300, 1020 + 300),
        # A short output is held whole, beside the prompt's last window.
        (0, 128, 1020),
        (300, 128, 1020 + 300),
        (1020, 128, 1020 + 1020),
        # A long one shares that window with others, and lets its own slide in steps.
        (1021, 128, 1020 + 1020),
        (2040, 128, 1020 + 510 + 128),
        (4080, 128, 1020 + 255 + 128),
        (4080, 1, 1020 + 255 + 1),
        (4080, 900, 1020 + 1020),
    ],
)
def test_slots_of_a_running_request(output: int | None, interval: int, slots: int) -> None:
    given = replace(MISTRAL, expected_output_tokens=output, eviction_interval=interval)
    assert given.streaming_per_request == slots
    assert replace(given, expected_tokens=700).streaming_per_request == 700, "it has no more tokens"


def test_never_above_the_budget() -> None:
    made = 0
    for budget, given in cases(1, 2000):
        try:
            split = split_budget(budget, given)
        except LightTransferError:
            continue
        made += 1
        assert split_bytes(split, given) <= budget
        assert split.requests > 0
        assert split.streaming_tokens >= given.streaming_fixed + longest(split, given)
        # One prefill chunk and the window before it must always fit.
        assert longest(split, given) >= given.retained_tokens
    assert made > 800


def test_little_is_left_over() -> None:
    for budget, given in cases(2, 500):
        if not given.full_bytes:
            continue
        try:
            split = split_budget(budget, given)
        except LightTransferError:
            continue
        # Rounding loses less than a slot in each pool, and the sink set of a fractional request.
        slack = given.full_bytes + given.streaming_bytes * (1 + given.sink_tokens)
        assert budget - split_bytes(split, given) <= slack


def test_both_pools_run_full_together() -> None:
    for budget, given in cases(3, 1000):
        if not given.full_bytes:
            continue
        try:
            split = split_budget(budget, given)
        except LightTransferError:
            continue
        in_full = split.full_tokens / given.expected_tokens
        in_streaming = (split.streaming_tokens - given.streaming_fixed) / given.streaming_per_request
        assert in_full == pytest.approx(split.requests, abs=1 / given.expected_tokens + 1e-6)
        if split.streaming_tokens == given.streaming_fixed + longest(split, given):
            assert in_streaming >= split.requests - 1 / given.streaming_per_request - 1e-6
        else:
            assert in_streaming == pytest.approx(split.requests, abs=1 / given.streaming_per_request + 1e-6)


def test_sink_sets_for_every_request_and_some_spare() -> None:
    for budget, given in cases(4, 500):
        try:
            split = split_budget(budget, given)
        except LightTransferError:
            continue
        assert split.sink_sets == (int(split.requests) + SPARE_SINK_SETS if given.sink_tokens else 0)


def test_every_layer_lazy() -> None:
    made = 0
    for budget, given in cases(5, 500, all_lazy=True):
        try:
            split = split_budget(budget, given)
        except LightTransferError:
            continue
        made += 1
        assert split_bytes(split, given) <= budget
        # Positions cost no KV bytes: there must be enough for the longest request, and an end to it.
        assert min(2 * given.context_tokens, MAX_VIRTUAL_TOKENS) <= split.full_tokens <= MAX_VIRTUAL_TOKENS
    assert made > 200


def test_too_small_names_the_flags() -> None:
    slots = MISTRAL.streaming_fixed + MISTRAL.retained_tokens + SPARE_SINK_SETS * MISTRAL.sink_tokens
    fixed = MISTRAL.streaming_bytes * slots
    for budget in (0, 1, fixed):
        with pytest.raises(LightTransferError, match="--mem-fraction-static"):
            split_budget(budget, MISTRAL)
    one_window = MISTRAL.full_bytes * (MISTRAL.retained_tokens + 1)
    assert split_budget(fixed + one_window + (1 << 20), MISTRAL).full_tokens >= MISTRAL.retained_tokens


def test_more_memory_never_means_fewer_requests() -> None:
    last = 0.0
    for gib in range(2, 60):
        split = split_budget(gib << 30, MISTRAL)
        assert split.requests > last
        last = split.requests


def test_a_longer_expectation_moves_memory_to_the_full_pool() -> None:
    budget = 50 << 30
    splits = [split_budget(budget, replace(MISTRAL, expected_tokens=1 << n)) for n in range(11, 16)]
    full = [split.full_tokens for split in splits]
    assert full == sorted(full)


def test_half_lazy_mistral_at_16k_nearly_doubles_the_requests() -> None:
    budget = 454_835 * 32 * 4096  # the pool of a stock server on one H100
    stock = budget / (32 * 4096 * MISTRAL.expected_tokens)
    assert 1.70 < split_budget(budget, MISTRAL).requests / stock < 1.89


def test_a_longer_output_needs_room_to_slide() -> None:
    def streaming(output: int | None) -> int:
        return replace(MISTRAL, expected_output_tokens=output).streaming_per_request

    window = MISTRAL.retained_tokens
    # A request holds its prompt's window beside up to a window of new tokens...
    assert [streaming(output) for output in (0, 1, 100, window)] == [window + n for n in (0, 1, 100, window)]
    # ... for a share of its life that falls with the length of its output.
    longer = [streaming(output) for output in range(window, 40 * window, 97)]
    assert longer == sorted(longer, reverse=True)
    assert window < longer[-1] < 1.2 * window
    assert window < streaming(None) < 2 * window


def test_split_tokens_keeps_the_full_pool_as_given() -> None:
    for tokens in (1, 1000, 100_000):
        split = split_tokens(tokens, MISTRAL)
        assert split.full_tokens == tokens
        assert split.requests == pytest.approx(tokens / MISTRAL.expected_tokens)
        assert split.streaming_tokens >= MISTRAL.streaming_fixed


def test_one_request_as_long_as_the_pool_fits_the_streaming_pool() -> None:
    """Two windows, the node that a lock begins in, the eviction interval, and the chunk in flight."""
    given = replace(MISTRAL, expected_tokens=4000, chunk_tokens=256, expected_output_tokens=300)
    window = given.retained_tokens
    assert given.streaming_longest == 3 * window + given.eviction_interval
    split = split_tokens(4000, given)
    assert split.requests == 1.0
    assert split.streaming_tokens == 3 * window + 128 + 256 + 2
    # A pool that holds no request so long needs no more than its length.
    assert split_tokens(1500, given).streaming_tokens == 1500 + 256 + 2
    assert replace(given, eviction_interval=5000).streaming_longest == 2 * window + 2 * 5000


@pytest.mark.parametrize("output", [1021, 2000, 100_000])
def test_a_long_output_slides_in_steps_of_the_eviction_interval(output: int) -> None:
    window = MISTRAL.retained_tokens
    held = replace(MISTRAL, expected_output_tokens=output, expected_tokens=200_000).streaming_per_request
    assert held == window + min(window, window * window // output + MISTRAL.eviction_interval)
    finer = replace(
        MISTRAL, expected_output_tokens=output, expected_tokens=200_000, eviction_interval=1
    ).streaming_per_request
    assert finer < held or held == 2 * window


def test_where_the_output_is_not_known_the_headroom_is_at_least_one_interval() -> None:
    for window, headroom in ((60, 128), (1020, 255)):
        assert replace(MISTRAL, retained_tokens=window).streaming_per_request == window + headroom
