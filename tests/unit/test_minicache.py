"""loadtest/experiments/minicache.py: what a merged pair of layers is restored to."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from loadtest.experiments import minicache


def _vectors(seed: int, positions: int = 40) -> torch.Tensor:
    return torch.randn(2, 3, positions, 8, generator=torch.Generator().manual_seed(seed))


def test_equal_directions_are_restored() -> None:
    """Each layer keeps its own lengths, so layers that differ in length alone lose nothing."""
    lower = _vectors(0)
    upper = lower * torch.linspace(0.5, 2, 40)[None, None, :, None]
    low, high = minicache.merge_pair(lower, upper)
    torch.testing.assert_close(low, lower)
    torch.testing.assert_close(high, upper)


def test_merged_direction_lies_on_the_arc() -> None:
    """At ``MIX`` of the angle from the lower layer's direction to the upper's; lengths as they were."""
    lower, upper = _vectors(1), _vectors(2)
    low, high = minicache.merge_pair(lower, upper)
    torch.testing.assert_close(low.norm(dim=3), lower.norm(dim=3))
    torch.testing.assert_close(high.norm(dim=3), upper.norm(dim=3))
    cosine = torch.nn.functional.cosine_similarity
    whole = cosine(lower, upper, dim=3).arccos()
    part = cosine(lower, low, dim=3).arccos()
    merged = ~torch.isclose(low, lower).all(3)
    torch.testing.assert_close(part[merged], minicache.MIX * whole[merged], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cosine(low, high, dim=3)[merged], torch.ones(int(merged.sum())))


def test_most_different_vectors_are_retained() -> None:
    lower, upper = _vectors(3), _vectors(4)
    low, high = minicache.merge_pair(lower, upper)
    kept = torch.isclose(low, lower).all(3)
    assert kept.sum(2).eq(round(minicache.RETAINED * 40)).all()
    assert torch.equal(high[kept], upper[kept])
    angle = torch.nn.functional.cosine_similarity(lower, upper, dim=3).arccos()
    assert (angle.masked_fill(~kept, 9).amin(2) >= angle.masked_fill(kept, 0).amax(2) - 1e-5).all()


def test_layers_below_the_first_stay() -> None:
    cache = DynamicCache()
    before = [(_vectors(2 * layer), _vectors(2 * layer + 1)) for layer in range(5)]
    for layer, (keys, values) in enumerate(before):
        cache.update(keys, values, layer)
    minicache.merge(cache, 1)
    same = [torch.equal(cache.layers[layer].keys, before[layer][0]) for layer in range(5)]
    assert same == [True, False, False, False, False]
    assert not torch.equal(cache.layers[4].values, before[4][1])


def test_memory() -> None:
    """30 layers of 64: half of them merged; and as many as a share asks for."""
    assert minicache.memory_share(30, 15, 64) == pytest.approx((16 + 7 * (1 + 2 / 64 + 0.1)) / 30)
    first = minicache.first_for(30, 64, 0.7)
    assert minicache.memory_share(30, first, 64) <= 0.7 < minicache.memory_share(30, first + 2, 64)
    assert minicache.first_for(30, 64, 0.3) == 0
