"""lt_sglang.identify.observation_window: the last queries of a prompt that comes in chunks of any size."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from lt_sglang.identify.observation_window import LastQueries, ObservationWindow


def whole(tokens: int, seed: int, hidden: bool) -> LastQueries:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(tokens, *shape, generator=generator)

    return LastQueries(draw(3, 4), draw(3, 4), draw(3), draw(6) if hidden else None)


def part(source: LastQueries, start: int, stop: int) -> LastQueries:
    hidden = None if source.hidden is None else source.hidden[start:stop]
    return LastQueries(source.query[start:stop], source.attention[start:stop], source.lse[start:stop], hidden)


def assert_same(found: LastQueries, expected: LastQueries) -> None:
    for name in ("query", "attention", "lse", "hidden"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name


@pytest.mark.parametrize("hidden", [True, False])
def test_chunks_of_any_size_give_the_prompts_last_queries(hidden: bool) -> None:
    """As if the prompt had come at once; layers do not mix."""
    rng = random.Random(3)
    for case in range(100):
        count = rng.choice([1, 4, 32])
        tails = ObservationWindow(count)
        tokens = rng.randint(2, 150)
        cuts = sorted(rng.sample(range(1, tokens), min(rng.randint(1, 6), tokens - 1)))
        bounds = [0, *cuts, tokens]
        layers = [whole(tokens, 2 * case + layer, hidden) for layer in range(2)]
        for start, stop in itertools.pairwise(bounds[:-1]):
            for layer, source in enumerate(layers):
                tails.keep(layer, part(source, start, stop), first=start == 0)
        for layer, source in enumerate(layers):
            found = tails.join(layer, part(source, bounds[-2], tokens), min(count, tokens))
            assert_same(found, part(source, max(tokens - count, 0), tokens))


def test_a_new_request_does_not_see_the_one_before() -> None:
    tails = ObservationWindow(8)
    old, new = whole(20, 1, True), whole(3, 2, True)
    tails.keep(0, old, first=True)
    tails.keep(0, new, first=True)
    assert_same(tails.join(0, part(whole(9, 3, True), 0, 0), 8), new)


def test_what_is_kept_is_a_copy() -> None:
    """The engine writes over its activations."""
    tails = ObservationWindow(4)
    source = whole(10, 1, True)
    kept = part(source, 6, 10).copy()
    tails.keep(0, source, first=True)
    for tensor in (source.query, source.attention, source.lse, source.hidden):
        assert tensor is not None
        tensor.zero_()
    assert_same(tails.join(0, part(source, 0, 0), 4), kept)


def test_a_long_last_chunk_needs_no_tail() -> None:
    tails = ObservationWindow(4)
    source = whole(10, 1, False)
    for length in (4, 5, 10):
        assert_same(tails.join(7, part(source, 0, length), 4), part(source, length - 4, length))
    tails.keep(7, source, first=True)
    tails.clear()
    with pytest.raises(KeyError):
        tails.join(7, part(source, 0, 2), 4)


def test_a_chunk_as_long_as_what_is_kept_needs_no_earlier_one() -> None:
    tails = ObservationWindow(4)
    source = whole(4, 1, False)
    tails.keep(0, source, first=False)
    assert_same(tails.join(0, part(source, 0, 0), 4), source)


def test_without_all_of_the_residual_stream_there_is_none() -> None:
    with_hidden, without = whole(2, 1, True), whole(2, 2, False)
    assert with_hidden.then(without).hidden is None and without.then(with_hidden).hidden is None
