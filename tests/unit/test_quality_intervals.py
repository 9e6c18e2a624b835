"""Intervals and verdicts, against scipy and simulation."""

from __future__ import annotations

import random

import pytest
from scipy import stats

from lt_sglang.eval.intervals import (
    Interval,
    paired_groups,
    paired_means,
    paired_rates,
    sign_test,
    trials_needed,
    verdict,
    wilson,
)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 30), (1, 30), (15, 30), (29, 30), (30, 30)])
def test_wilson_is_scipys(successes: int, trials: int) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    found = wilson(successes, trials)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_trial_tells_nothing() -> None:
    assert wilson(0, 0) == Interval(0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        wilson(3, 2)


def test_sign_test_is_scipys() -> None:
    first = [True] * 9 + [False] * 2 + [True] * 5 + [False] * 4
    second = [False] * 9 + [True] * 2 + [True] * 5 + [False] * 4
    assert sign_test(first, second) == pytest.approx(stats.binomtest(2, 11).pvalue)
    assert sign_test(first, first) == 1.0


def test_newcombes_example() -> None:
    """20 right in both, 12 and 2 in one only, 16 in neither: 0.0562 to 0.3292 by method 10."""
    first = [True] * 20 + [True] * 12 + [False] * 2 + [False] * 16
    second = [True] * 20 + [False] * 12 + [True] * 2 + [False] * 16
    found = paired_rates(second, first)
    assert (found.low, found.high) == pytest.approx((0.0562, 0.3292), abs=1e-4)
    turned = paired_rates(first, second)
    assert (-turned.high, -turned.low) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize("loss", [0.0, 0.1, 0.3])
def test_paired_interval_covers(loss: float) -> None:
    """The true difference lies in about 95 % of the intervals."""
    rng = random.Random(1)
    covered = 0
    for _ in range(600):
        first = [rng.random() < 0.9 for _ in range(60)]
        second = [hit and rng.random() >= loss for hit in first]
        found = paired_rates(first, second)
        covered += found.low <= -0.9 * loss <= found.high
    assert covered >= 0.93 * 600


def test_paired_means() -> None:
    rng = random.Random(2)
    first = [rng.random() for _ in range(200)]
    second = [value + rng.gauss(-0.1, 0.05) for value in first]
    found = paired_means(first, second)
    expected = stats.t.interval(
        0.95, 199, -0.1, stats.sem([b - a for a, b in zip(first, second, strict=True)])
    )
    assert (found.low, found.high) == pytest.approx(expected, abs=0.01)
    assert found == paired_means(first, second)


@pytest.mark.parametrize("compare", [paired_rates, paired_means, sign_test])
def test_pairs_must_match(compare: object) -> None:
    for first, second in (([True], []), ([], [])):
        with pytest.raises(ValueError, match="compared in pairs"):
            compare(first, second)  # type: ignore[operator]


def test_verdicts() -> None:
    assert verdict(Interval(-0.02, 0.03), 0.05) == "no worse"
    assert verdict(Interval(-0.04, -0.01), 0.05) == "no worse"
    assert verdict(Interval(-0.30, -0.10), 0.05) == "worse"
    assert verdict(Interval(-0.30, 0.10), 0.05) == "cannot tell"


def test_a_small_sample_cannot_tell_and_says_how_many_could() -> None:
    first, second = [True] * 10, [True] * 9 + [False]
    assert verdict(paired_rates(first, second), 0.05) == "cannot tell"
    needed = trials_needed(first, second, 0.05)
    assert 100 < needed < 200
    wide = paired_rates(first * (needed // 10), second * (needed // 10))
    assert (wide.high - wide.low) / 2 == pytest.approx(0.05, abs=0.01)


def test_groups_are_drawn_whole() -> None:
    """Questions on one text that are all right or all wrong tell as much as one question would."""
    rng = random.Random(3)
    texts = [float(rng.random() < 0.7) for _ in range(60)]
    alone = paired_groups([1.0] * 60, texts, range(60))
    by_four = [right for right in texts for _ in range(4)]
    together = paired_groups([1.0] * 240, by_four, [n // 4 for n in range(240)])
    assert together == alone
    mean = sum(texts) / 60
    assert alone.ratio is not None and alone.ratio.low < mean < alone.ratio.high
    assert (alone.difference.low, alone.difference.high) == pytest.approx(
        (alone.ratio.low - 1, alone.ratio.high - 1)
    )
    spread = 1.96 * (mean * (1 - mean) / 60) ** 0.5
    assert alone.ratio.high - alone.ratio.low == pytest.approx(2 * spread, rel=0.15)
    apart = paired_groups([1.0] * 240, by_four, range(240))
    assert apart.difference.high - apart.difference.low < 0.6 * (alone.ratio.high - alone.ratio.low)


def test_a_ratio_to_nothing_is_none() -> None:
    found = paired_groups([0.0, 0.0], [1.0, 0.0], ["a", "b"])
    assert found.ratio is None and found.difference.high == 1
    with pytest.raises(ValueError, match="1 and 2 items cannot be compared"):
        paired_groups([1.0], [1.0, 1.0], ["a", "b"])
