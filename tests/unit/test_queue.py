"""lt_sglang.identify.queue: the queue of a prefill against the definition, and where layers end up."""

from __future__ import annotations

import random

import pytest
import torch

from lt_sglang.identify.queue import NOBODY, queue_step
from lt_sglang.layers.layer_sets import UNDECIDED

from ..lazy_queue import popped_layers

SHAPES = [(2, 1), (6, 3), (6, 1), (6, 5), (7, 4), (30, 15), (32, 24)]


def draw(rng: random.Random, layers: int) -> list[float]:
    """Scores with many ties, of either sign, sometimes all equal."""
    values = rng.choice([[0.5], [0.0, 1.0], [-3.0, -1.0, -1.0, 2.0], [rng.uniform(-1, 1) for _ in range(99)]])
    return [rng.choice(values) for _ in range(layers)]


@pytest.mark.parametrize(("layers", "keep"), SHAPES)
def test_pops_what_the_definition_pops_for_every_request_of_a_batch(layers: int, keep: int) -> None:
    """Each step names the layer popped; rows of other requests are not touched."""
    rng = random.Random(layers * 100 + keep)
    for _ in range(30):
        capacity = rng.randint(1, 6)
        scores = [draw(rng, layers) for _ in range(capacity)]
        sets = torch.tensor(rng.sample(range(capacity), rng.randint(1, capacity)))
        bank_of = torch.full((capacity, layers), UNDECIDED, dtype=torch.int32)
        laziness = torch.tensor(scores, dtype=torch.float32)
        popped = [queue_step(bank_of, laziness, sets, layer, keep).tolist() for layer in range(layers)]
        for column, row in enumerate(sets.tolist()):
            expected = popped_layers(scores[row], keep)
            assert [step[column] for step in popped] == [NOBODY] * keep + expected
            lazy = {layer for layer in range(layers) if bank_of[row, layer] >= keep}
            assert lazy == set(expected)
        untouched = sorted(set(range(capacity)) - set(sets.tolist()))
        assert (bank_of[untouched] == UNDECIDED).all()


@pytest.mark.parametrize(("layers", "keep"), SHAPES)
def test_every_layer_is_where_its_rows_were_moved(layers: int, keep: int) -> None:
    """Follow the rows as the backends move them: no bank is overwritten while it is somebody's."""
    rng = random.Random(layers * 7 + keep)
    for _ in range(50):
        bank_of = torch.full((1, layers), UNDECIDED, dtype=torch.int32)
        # Left over from the request that had this row before.
        bank_of[0] = torch.tensor(rng.sample(range(layers), layers), dtype=torch.int32)
        laziness = torch.tensor([draw(rng, layers)], dtype=torch.float32)
        holds: dict[int, int] = {}
        for layer in range(layers):
            (popped,) = queue_step(bank_of, laziness, torch.tensor([0]), layer, keep).tolist()
            if popped == NOBODY:
                assert layer not in holds
                holds[layer] = layer
            elif popped == layer:
                assert layer not in holds
                holds[layer] = layer  # straight into the streaming bank of this step
            else:
                freed = int(bank_of[0, layer])
                assert holds[freed] == popped, "the bank that is handed on was the popped layer's"
                assert layer not in holds, "the popped layer's streaming bank is free"
                holds[layer], holds[freed] = popped, layer
            assert [holds[int(bank_of[0, i])] for i in range(layer + 1)] == list(range(layer + 1))
        assert sorted(bank_of[0].tolist()) == list(range(layers))


@pytest.mark.parametrize(
    ("scores", "popped"),
    [
        ([1.0, torch.inf, 2.0], 1),
        ([1.0, torch.nan, 2.0], 1),
        ([torch.nan, torch.inf, 2.0], 1),
        ([torch.inf, torch.nan, 2.0], 1),
        ([-torch.inf, 1.0, -2.0], 1),
        ([-torch.inf, -torch.inf, -torch.inf], 2),
    ],
)
def test_infinity_and_what_is_no_number_are_laziest(scores: list[float], popped: int) -> None:
    bank_of = torch.full((1, 3), UNDECIDED, dtype=torch.int32)
    laziness = torch.tensor([scores])
    steps = [queue_step(bank_of, laziness, torch.tensor([0]), layer, 2).item() for layer in range(3)]
    assert steps == [NOBODY, NOBODY, popped]


def test_works_in_place_on_the_tables_it_is_given() -> None:
    """Indices may be int64 on any device; the table keeps its dtype."""
    bank_of = torch.full((3, 4), UNDECIDED, dtype=torch.int32)
    laziness = torch.tensor([[0.0] * 4, [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    for layer in range(4):
        queue_step(bank_of, laziness, torch.tensor([2, 1]), layer, 2)
    assert bank_of.tolist() == [[UNDECIDED] * 4, [2, 3, 0, 1], [0, 1, 2, 3]]
    assert bank_of.dtype is torch.int32
