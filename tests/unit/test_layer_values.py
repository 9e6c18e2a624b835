"""loadtest/experiments/layer_values.py: Shapley values, against the definition over all sets of layers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from math import factorial

import pytest

from loadtest.experiments.layer_values import Counting, lists_of, shapley

LAYERS = 6


class Game:
    """A cost of each set of layers, drawn by seed, that grows with the set; of no layer it is 0."""

    counted = 3

    def __init__(self, seed: int, most: int) -> None:
        rng = random.Random(seed)
        # What a few layers cost together beyond what fewer of them do.
        self.parts = {
            some: rng.random() for size in range(1, most + 1) for some in combinations(range(LAYERS), size)
        }
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, choices: Sequence[tuple[int, ...]]) -> list[float]:
        self.asked += choices
        return [self.of(choice) for choice in choices]

    def of(self, choice: Sequence[int]) -> float:
        return sum(part for some, part in self.parts.items() if set(some) <= set(choice))

    def exact(self, layer: int) -> float:
        others = [other for other in range(LAYERS) if other != layer]
        return sum(
            factorial(size)
            * factorial(LAYERS - size - 1)
            / factorial(LAYERS)
            * (self.of([*some, layer]) - self.of(some))
            for size in range(LAYERS)
            for some in combinations(others, size)
        )


def test_what_pairs_cost_together_is_split_exactly_by_one_order_and_its_reverse() -> None:
    game = Game(0, most=2)
    found = shapley(LAYERS, game, pairs=1, seed=9)
    assert found.shapley == pytest.approx([game.exact(layer) for layer in range(LAYERS)])
    assert len(game.asked) == 2 * LAYERS and all(list(one) == sorted(one) for one in game.asked)


def test_values_come_close_within_their_errors() -> None:
    game = Game(1, most=LAYERS)
    found = shapley(LAYERS, game, pairs=400, seed=2)
    assert sum(found.shapley) == pytest.approx(game.of(range(LAYERS)))
    for layer in range(LAYERS):
        assert abs(found.shapley[layer] - game.exact(layer)) < 4 * found.error[layer]
        assert 0 < found.error[layer] < 0.05 * found.shapley[layer]


def test_the_first_half_adds_less_where_layers_cost_more_together() -> None:
    """Up to three layers are lazy then: exact for a cost of single layers, and less for this one."""
    alone, game = Game(3, most=1), Game(3, most=3)
    assert shapley(LAYERS, alone, 4, 0).first_half == pytest.approx(
        [alone.of([one]) for one in range(LAYERS)]
    )
    found = shapley(LAYERS, game, 50, 0)
    for layer in range(LAYERS):
        assert game.of([layer]) < found.first_half[layer] < found.shapley[layer]


def test_lists_and_what_they_take() -> None:
    game = Game(4, most=2)
    named, report = lists_of(LAYERS, Counting(game), pairs=2, seed=0)  # type: ignore[arg-type]
    order = sorted(range(LAYERS), key=game.exact)
    assert set(named["shapley"](2)) == set(order[:4])
    assert set(named["single"](3)) == set(sorted(range(LAYERS), key=lambda layer: game.of([layer]))[:3])
    assert named["greedy"](5) == named["single"](5)
    tried = {"single": 6, "shapley": 2 * 2 * 6, "greedy": 6 + 5 + 4 + 3 + 2}
    assert report["passes"] == {name: count * game.counted for name, count in tried.items()}
    assert sum(report["passes"].values()) == game.counted * len(game.asked)
