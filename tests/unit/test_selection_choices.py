"""Prompt-independent layer choices, and the priority queue of the paper."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.static_choices import CHOICES, choose, parse_choice

from ..lazy_queue import LazyQueue


def test_choices() -> None:
    assert list(CHOICES) == ["half", "all", "ends", "random", "pyramid"]
    assert choose("half", 5) == (1, 3)
    assert choose("all", 4) == (0, 1, 2, 3)
    assert choose("ends", 8, 4) == choose("ends", 8, 0.5) == (0, 1, 6, 7)
    assert choose("ends", 8, 5) == (0, 1, 5, 6, 7), "the odd one at the deep end"
    assert choose("pyramid", 6, 4) == (2, 3, 4, 5)


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
    assert set(choose("random", 32, 12, 7)) < set(here), "fewer lazy layers are a part of more"


@pytest.mark.parametrize("name", ["ends", "random", "pyramid"])
@pytest.mark.parametrize("layers", [1, 2, 7, 32])
def test_every_choice_makes_as_many_layers_lazy_as_asked(name: str, layers: int) -> None:
    for count in range(layers + 1):
        lazy = choose(name, layers, count, 3)
        assert len(lazy) == count
        assert list(lazy) == sorted(set(lazy)) and set(lazy) <= set(range(layers))


@pytest.mark.parametrize(
    ("name", "lazy", "message"),
    [
        ("middle", 2, "lazy_layers: 'middle' is not one of half, all, ends, random, pyramid"),
        ("all", 1, "lazy_layers: 'all' takes no number of lazy layers"),
        ("random", None, "lazy_layers: 'random' needs a number of lazy layers"),
        ("ends", 9, "lazy_layers: ends:9 of 8 layers is 9; 1 to 8 can be lazy"),
        ("ends", 0.05, "lazy_layers: ends:0.05 of 8 layers is 0; 1 to 8 can be lazy"),
        ("pyramid", -1, "lazy_layers: pyramid:-1"),
    ],
)
def test_wrong_choices_are_refused(name: str, lazy: int | float | None, message: str) -> None:
    with pytest.raises(LightTransferError, match=message):
        choose(name, 8, lazy)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("half", ("half", None)),
        ("all", ("all", None)),
        ("ends:0.5", ("ends", 0.5)),
        ("random:12", ("random", 12)),
        ("5-24", None),
        ("none", None),
        ("middle:0.5", None),
    ],
)
def test_choices_are_read(text: str, choice: tuple[str, int | float | None] | None) -> None:
    assert parse_choice(text) == choice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ends", "where: 'ends' must be written ends:0.5"),
        ("half:0.5", "where: 'half:0.5' must be written half"),
        ("ends:", "where: 'ends:': '' is neither a number of layers from 1 nor a share such as 0.5"),
        ("pyramid:1.5", "where: 'pyramid:1.5': '1.5' is neither"),
        ("random:0", "where: 'random:0': '0' is neither"),
        ("ends:1025", "where: 'ends:1025': 1025 is neither"),
    ],
)
def test_wrong_spellings_are_refused(text: str, message: str) -> None:
    with pytest.raises(LightTransferError) as caught:
        parse_choice(text, "where")
    assert message in str(caught.value)


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
