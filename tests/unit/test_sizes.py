"""lt_sglang.memory.sizes: how much there is, by seeded random cases."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from lt_sglang.config import DEFAULT_LAST_QUERIES, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.demand import Demand
from lt_sglang.memory.sizes import MAX_POSITIONS, POSITION_BYTES, TABLE_BYTES, Sizes, size_memory
from lt_sglang.memory.units import UnitShape

CONFIG = LightTransferConfig((1, 3), sink_tokens=4, recent_tokens=1020)
DYNAMIC = LightTransferConfig((1, 3), mode="dynamic", keep=2, sink_tokens=4, recent_tokens=1020)
MISTRAL = {
    "token_layer_bytes": 4096,
    "page_size": 1,
    "chunk_tokens": 8192,
    "context_tokens": 32768,
    "interval": 128,
    "full_limit": None,
}


def sized(budget: int, shape: UnitShape, config: LightTransferConfig = CONFIG, **changes: Any) -> Sizes:
    return size_memory(budget, shape, config, **{**MISTRAL, **changes})


def cases(
    seed: int, count: int, all_lazy: bool = False
) -> Iterator[tuple[int, UnitShape, LightTransferConfig, dict[str, Any]]]:
    rng = random.Random(seed)
    for _ in range(count):
        layers = rng.randrange(1, 80)
        lazy = layers if all_lazy else rng.randrange(1, layers + 1)
        dynamic = not all_lazy and lazy < layers and rng.random() < 0.4
        config = LightTransferConfig(
            (1,),
            mode="dynamic" if dynamic else "static",
            keep=layers - lazy if dynamic else None,
            sink_tokens=rng.choice([0, 1, 4, 129]),
            recent_tokens=rng.randrange(1, 3000),
        )
        given = {
            "token_layer_bytes": rng.choice([256, 512, 4096]),
            "page_size": rng.choice([1, 16, 64]),
            "chunk_tokens": rng.randrange(64, 16384),
            "context_tokens": rng.randrange(2048, 200_000),
            "interval": rng.choice([1, 128]),
            "full_limit": rng.choice([None, None, rng.randrange(20_000, 500_000)]),
        }
        yield rng.randrange(1 << 24, 1 << 38), UnitShape(layers - lazy, lazy), config, given


def bytes_of(sizes: Sizes) -> int:
    """K, V and the tables of slots, the padding unit included; and of positions, if no layer is full."""
    page = sizes.demand.page_size
    positions = 0
    if not sizes.shape.full_layers:
        assert sizes.full_limit is not None
        positions = max(sizes.full_limit - 2 * sizes.demand.context, 0) * POSITION_BYTES
    return positions + (sizes.units + 1) * (
        sizes.unit_bytes + page * (TABLE_BYTES + 4 * (sizes.shape.parts - 1))
    )


def test_never_above_the_budget_and_little_is_left_over() -> None:
    made = 0
    for budget, shape, config, given in cases(1, 1500):
        try:
            sizes = sized(budget, shape, config, **given)
        except LightTransferError:
            continue
        made += 1
        assert bytes_of(sizes) <= budget
        if given["full_limit"] is None:
            # Positions are rounded up to units of their own.
            most = 1 if shape.full_layers else 2
            assert budget - bytes_of(sizes) < most * (bytes_of(sizes) // (sizes.units + 1))
    assert made > 500


def test_the_longest_request_fits_and_is_a_prefill_chunk_and_a_window() -> None:
    for budget, shape, config, given in cases(2, 1500):
        try:
            sizes = sized(budget, shape, config, **given)
        except LightTransferError:
            continue
        least = config.retained_tokens + given["chunk_tokens"]
        bounds = [least, given["context_tokens"], sizes.full_slots]
        assert sizes.longest >= min(bounds)
        assert sizes.longest <= sizes.full_slots
        tokens = min(sizes.longest, given["context_tokens"])
        assert sizes.demand.of_new(tokens - tokens // 3, tokens // 3) <= sizes.units
        if sizes.full_limit is not None:
            assert sizes.full_limit % given["page_size"] == 0 and sizes.longest <= sizes.full_limit


def test_unit_bytes_and_slots() -> None:
    sizes = sized(50 << 30, UnitShape(8, 24), page_size=16)
    assert sizes.unit_bytes == 16 * 8 * 4096
    assert sizes.full_slots == sizes.units * 16
    assert sizes.streaming_slots == sizes.units // 3 * 16
    assert sizes.demand == Demand(UnitShape(8, 24), 16, 1020, 128, 8192, 32768, 0, 4)


def test_every_layer_lazy() -> None:
    """Positions cost no KV bytes: there must be enough for the longest request, and an end to it."""
    made = 0
    for budget, shape, config, given in cases(3, 500, all_lazy=True):
        try:
            sizes = sized(budget, shape, config, **{**given, "full_limit": None})
        except LightTransferError:
            continue
        made += 1
        page = given["page_size"]
        assert bytes_of(sizes) <= budget and sizes.full_limit is not None
        assert min(2 * given["context_tokens"], MAX_POSITIONS) - page < sizes.full_limit <= MAX_POSITIONS
        assert sizes.full_slots == sizes.full_limit
        if sizes.units * page > sizes.demand.streaming_longest + 300:
            assert sizes.longest >= min(given["context_tokens"], sizes.full_limit) - page
    assert made > 200


def test_too_small_names_the_flags() -> None:
    for budget in (0, 1, 1 << 20, 1 << 30):
        with pytest.raises(
            LightTransferError, match=r"KV memory: .* raise --mem-fraction-static or lower --chunk"
        ):
            sized(budget, UnitShape(16, 16))
    sized(3 << 30, UnitShape(16, 16))
    with pytest.raises(LightTransferError, match="KV memory"):
        sized(50 << 30, UnitShape(16, 16), full_limit=5, page_size=16)


def test_a_limit_of_tokens_takes_memory_for_no_more() -> None:
    """But for all of them in lazy layers as well, and their sinks."""
    free, limited = sized(50 << 30, UnitShape(16, 16)), sized(50 << 30, UnitShape(16, 16), full_limit=20_000)
    assert limited.full_limit == limited.longest == 20_000
    assert 40_000 < limited.units < 42_000 < free.units
    above = sized(50 << 30, UnitShape(16, 16), full_limit=10**9)
    assert above.units == free.units
    assert sized(50 << 30, UnitShape(16, 16), full_limit=20_001, page_size=16).full_limit == 20_000


def test_a_small_limit_still_serves_a_request_of_it() -> None:
    sizes = sized(50 << 30, UnitShape(16, 16), full_limit=300)
    assert sizes.longest == 300


def test_more_memory_never_means_fewer_requests() -> None:
    last = 0.0
    for gib in range(3, 60):
        found = sized(gib << 30, UnitShape(16, 16)).requests(16_000, 300)
        assert found > last
        last = found


def test_half_lazy_mistral_at_16k_nearly_doubles_the_requests() -> None:
    budget = 454_835 * 32 * 4096  # the pool of a stock server on one H100
    stock = 454_835 / 16_384
    assert 1.70 < sized(budget, UnitShape(16, 16)).requests(16_128, 256) / stock < 1.89


def test_short_and_long_requests_have_all_memory_alike() -> None:
    """What a split for one length kept from requests of another is theirs now."""
    sizes = sized(50 << 30, UnitShape(16, 16))
    for prompt in (500, 4000, 16_000):
        first, others = sizes.demand.of_new(prompt, 200), sizes.demand.of_decoding(prompt, 200)
        assert first + (sizes.requests(prompt, 200) - 1) * others == pytest.approx(sizes.units)
    assert sizes.requests(10**7, 0) == pytest.approx(sizes.units / sizes.demand.of_new(10**7, 0))
    assert sizes.longest > 0.9 * sizes.units


def test_how_long_a_prompt_may_stay_undecided() -> None:
    """As long as memory for one request allows; no less than tells layers apart; at most the context."""
    sizes = sized(50 << 30, UnitShape(16, 16), DYNAMIC)
    assert sizes.demand.undecided == 32768
    assert sized(50 << 30, UnitShape(16, 16)).demand.undecided == 0
    small = sized(3 << 30, UnitShape(16, 16), DYNAMIC)
    assert small.demand.undecided == small.demand.undecided_limit(small.units) < 32768
    held = small.demand.undecided + small.demand.chunk
    assert small.demand.units(held, held) + small.demand.both + 4 <= small.units
    least = sized(6 << 28, UnitShape(16, 16), DYNAMIC, chunk_tokens=4000)
    assert least.demand.undecided >= 1024 + DEFAULT_LAST_QUERIES
    first = LightTransferConfig((1, 3), mode="dynamic", keep=2, decide="first-chunk")
    assert sized(50 << 30, UnitShape(16, 16), first).demand.undecided == first.decide_tokens - 1


def test_what_the_log_says() -> None:
    line = sized(50 << 30, UnitShape(8, 24), page_size=16).describe()
    assert "units of 16 x 8 rows, 49." in line and "index lists instead of 2" in line
    assert "a token takes 1 for 8 full and, within a window, 3 for 24 lazy layers" in line
    assert "tokens in full layers" not in line
    line = sized(50 << 30, UnitShape(16, 16), full_limit=20_000).describe()
    assert "requests of up to 20000 tokens, at most 20000 tokens in full layers" in line
    assert "index lists" not in line
    assert (
        "1 and 3 have no common divisor above 1, so each step writes 4 index lists"
        in sized(50 << 30, UnitShape(1, 3)).describe()
    )
