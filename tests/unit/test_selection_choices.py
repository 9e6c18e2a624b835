"""Prompt-independent layer choices, and the priority queue of the paper."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.static_choices import CHOICES, choose

from ..lazy_queue import LazyQueue


def test_choices() -> None:
    assert CHOICES == ("all", "ends", "random", "pyramid")
    assert choose("all", 4, 0) == (0, 1, 2, 3)
    assert choose("ends", 8, 4) == (0, 1, 6, 7)
    assert choose("ends", 8, 3) == (0, 1, 5, 6, 7), "the odd one at the deep end"
    assert choose("pyramid", 6, 2) == (2, 3, 4, 5)


def test_random_is_the_same_everywhere_and_depends_on_the_seed() -> None:
    code = "import sys; from lt_sglang.static_choices import choose; print(choose('random', 32, 16, 7)); "
    code += "sys.exit('torch' in sys.modules)"  # a command line that only plans must not load torch
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = choose("random", 32, 16, 7)
    assert other.strip() == str(here)
    # Written down once: another process or Python version must not draw differently.
    assert choose("random", 8, 4, 2) == (0, 3, 4, 7)
    drawn = [choose("random", 32, 16, seed) for seed in range(40)]
    assert len(set(drawn)) == 40
    counts = [sum(layer in lazy for lazy in drawn) for layer in range(32)]
    assert min(counts) >= 8 and max(counts) <= 32, "every layer is drawn about half the time"
    assert set(choose("random", 32, 20, 7)) < set(here), "fewer lazy layers are a part of more"


@pytest.mark.parametrize("name", ["ends", "random", "pyramid"])
@pytest.mark.parametrize("layers", [1, 2, 7, 32])
def test_every_choice_keeps_as_many_layers_as_asked(name: str, layers: int) -> None:
    for keep in range(layers + 1):
        lazy = choose(name, layers, keep, 3)
        assert len(lazy) == layers - keep
        assert list(lazy) == sorted(set(lazy)) and set(lazy) <= set(range(layers))


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("middle", 2, "choice: 'middle' is not one of all, ends, random, pyramid"),
        ("all", 1, "keep: the choice 'all' .* not 1"),
        ("ends", 9, "keep: 9 is not a number of layers from 0 to 8"),
        ("pyramid", -1, "keep: -1"),
    ],
)
def test_wrong_choices_are_refused(name: str, keep: int, message: str) -> None:
    with pytest.raises(LightTransferError, match=message):
        choose(name, 8, keep)


def test_queue_pops_the_laziest_when_it_overflows() -> None:
    queue = LazyQueue(2)
    popped = [queue.push(layer, value) for layer, value in enumerate([0.5, 0.9, 0.7, 0.8, 0.1])]
    assert popped == [None, None, 1, 3, 2]
    assert queue.full_layers == (0, 4)


def test_queue_may_pop_the_pushed_layer() -> None:
    queue = LazyQueue(0)
    assert [queue.push(layer, 0.5) for layer in range(3)] == [0, 1, 2]
    assert queue.full_layers == ()


def test_of_equals_the_higher_index_is_popped() -> None:
    queue = LazyQueue(2)
    assert [queue.push(layer, 1.0) for layer in (0, 5, 3, 4)] == [None, None, 5, 4]
    assert queue.full_layers == (0, 3)
    # -0.0 and 0.0 are equal.
    queue = LazyQueue(1)
    assert [queue.push(0, 0.0), queue.push(1, -0.0)] == [None, 1]


@pytest.mark.parametrize("seed", range(20))
def test_queue_keeps_what_a_sort_would_keep(seed: int) -> None:
    """Popping as one goes ends where sorting all layers at once does."""
    rng = random.Random(seed)
    values = [rng.choice([0.1, 0.2, 0.3, rng.random()]) for _ in range(40)]
    capacity = rng.randrange(41)
    queue = LazyQueue(capacity)
    popped = [queue.push(layer, value) for layer, value in enumerate(values)]
    kept = sorted(range(40), key=lambda layer: (values[layer], layer))[:capacity]
    assert queue.full_layers == tuple(sorted(kept))
    assert sorted(layer for layer in popped if layer is not None) == sorted(set(range(40)) - set(kept))
    assert popped[:capacity] == [None] * capacity and None not in popped[capacity:]


def test_queue_refuses_what_has_no_order() -> None:
    with pytest.raises(ValueError, match="layer 3: laziness is not a number"):
        LazyQueue(1).push(3, float("nan"))
    with pytest.raises(ValueError, match="capacity: -1 is negative"):
        LazyQueue(-1)
