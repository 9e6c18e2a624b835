"""How sure a comparison is: intervals at 95 %, and whether the sample is large enough to tell."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
BOOTSTRAP_SAMPLES = 2000
DEFAULT_MARGIN = 0.05


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


def wilson(successes: float, trials: int) -> Interval:
    """The 95 % interval of a rate (Wilson 1927); [0, 1] without trials; ValueError if they disagree."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if trials == 0:
        return Interval(0.0, 1.0)
    rate = successes / trials
    shrink = 1 + Z**2 / trials
    centre = (rate + Z**2 / (2 * trials)) / shrink
    half = Z / shrink * math.sqrt(rate * (1 - rate) / trials + Z**2 / (4 * trials**2))
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0))


def paired_rates(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """The 95 % interval of rate(second) - rate(first), the same trials in both (Newcombe 1998, method 10).

    Raises:
        ValueError: they differ in length or are empty.
    """
    both, lost, won, neither = _table(first, second)
    trials = both + lost + won + neither
    p1, p2 = (both + lost) / trials, (both + won) / trials
    one, two = wilson(both + lost, trials), wilson(both + won, trials)
    product = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    phi = 0.0
    if product:
        # Newcombe's continuity correction: a small positive correlation counts as none.
        excess = both * neither - lost * won
        phi = (max(excess - trials / 2, 0.0) if excess > 0 else excess) / math.sqrt(product)
    difference = p2 - p1
    down = (p2 - two.low) ** 2 - 2 * phi * (p2 - two.low) * (one.high - p1) + (one.high - p1) ** 2
    up = (two.high - p2) ** 2 - 2 * phi * (two.high - p2) * (p1 - one.low) + (p1 - one.low) ** 2
    return Interval(difference - math.sqrt(max(down, 0.0)), difference + math.sqrt(max(up, 0.0)))


def paired_means(
    first: Sequence[float], second: Sequence[float], strata: Sequence[Hashable] = (), seed: int = 0
) -> Interval:
    """The 95 % interval of mean(second) - mean(first) over the same items, by a seeded percentile bootstrap.

    strata: of each item, such as its task; then it is the mean over strata of their means, and items are
    drawn within each of them.

    Raises:
        ValueError: they differ in length or are empty.
    """
    import numpy

    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} items cannot be compared in pairs")
    differences = numpy.asarray(second, dtype=float) - numpy.asarray(first, dtype=float)
    generator = numpy.random.default_rng(seed)
    labels = list(strata) or [None] * len(differences)
    means = []
    for stratum in dict.fromkeys(labels):
        inside = differences[[label == stratum for label in labels]]
        draws = generator.integers(0, len(inside), (BOOTSTRAP_SAMPLES, len(inside)))
        means.append(inside[draws].mean(axis=1))
    low, high = numpy.percentile(numpy.mean(means, axis=0), [2.5, 97.5])
    return Interval(float(low), float(high))


@dataclass(frozen=True)
class Paired:
    """Two sums of right answers to the same questions: 95 % intervals of second - first and second / first.

    difference: in means a question. ratio: None where ``first`` has no right answer.
    """

    difference: Interval
    ratio: Interval | None


def paired_groups(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Hashable], seed: int = 0
) -> Paired:
    """A seeded percentile bootstrap that draws whole groups, such as all questions on one document.

    Raises:
        ValueError: they differ in length or are empty.
    """
    import numpy

    if not len(first) == len(second) == len(groups) or not first:
        raise ValueError(f"{len(first)} and {len(second)} items cannot be compared in pairs")
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    sums = numpy.zeros((3, len(places)))
    for one, other, group in zip(first, second, groups, strict=True):
        sums[:, places[group]] += (one, other, 1.0)
    draws = numpy.random.default_rng(seed).integers(0, len(places), (BOOTSTRAP_SAMPLES, len(places)))
    ones, others, counts = sums[:, draws].sum(axis=2)
    difference = numpy.percentile((others - ones) / counts, [2.5, 97.5])
    if not sums[0].any():
        return Paired(Interval(*map(float, difference)), None)
    # A draw without a right answer tells nothing of the ratio.
    ratio = numpy.percentile(others[ones > 0] / ones[ones > 0], [2.5, 97.5])
    return Paired(Interval(*map(float, difference)), Interval(*map(float, ratio)))


def sign_test(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of McNemar's exact test: are the trials lost and those won equally many?"""
    _, lost, won, _ = _table(first, second)
    trials, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(trials, k) for k in range(fewer + 1))
    return min(1.0, 2.0 * tail / 2.0**trials)


def trials_needed(first: Sequence[bool], second: Sequence[bool], margin: float) -> int:
    """Trials after which the interval of the difference would be ``margin`` wide on each side.

    Reckoned with the share of trials that differ here, and at least one half of a trial.
    """
    _, lost, won, _ = _table(first, second)
    trials = len(first)
    differ = max(lost + won, 0.5) / trials
    variance = max(differ - ((won - lost) / trials) ** 2, 0.0)
    return math.ceil(Z**2 * (variance or differ) / margin**2)


def verdict(difference: Interval, margin: float = DEFAULT_MARGIN) -> str:
    """What the interval of (lightened - full) says; ``margin`` is the loss one would accept.

    "no worse": the loss is at most the margin. "worse": there is a loss. "cannot tell": neither is sure.
    A loss that is sure but below the margin is "no worse".
    """
    if difference.low >= -margin:
        return "no worse"
    return "worse" if difference.high < 0 else "cannot tell"


def _table(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, int, int]:
    """Trials right in both, in the first alone, in the second alone, in neither."""
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} trials cannot be compared in pairs")
    pairs = list(zip(map(bool, first), map(bool, second), strict=True))
    return (
        pairs.count((True, True)),
        pairs.count((True, False)),
        pairs.count((False, True)),
        pairs.count((False, False)),
    )
