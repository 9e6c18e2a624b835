"""MiniCache (arXiv 2405.14366) on a transformers cache: neighbouring layers share directions, by SLERP.

Written from the paper. Vectors are those of one head and position. Of each pair of layers one direction is
kept, the spherical interpolation of both at ``MIX``, and each layer's own lengths. The share ``RETAINED`` of
a pair's vectors, those whose directions differ most, stays as it was; the paper cuts at a distance instead,
here the share is fixed, so that the memory is known beforehand. Its quantisation is left out.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

MIX, RETAINED = 0.6, 0.05


def merge_pair(lower: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both layers' keys (or values) [batch, heads, positions, dim] as they are restored after merging."""
    a, b = lower.float(), upper.float()
    length_a, length_b = a.norm(dim=3, keepdim=True), b.norm(dim=3, keepdim=True)
    unit_a, unit_b = a / length_a.clamp(min=1e-12), b / length_b.clamp(min=1e-12)
    cosine = (unit_a * unit_b).sum(3, keepdim=True).clamp(-1, 1)
    angle = cosine.arccos()
    sine = angle.sin()
    mixed = (((1 - MIX) * angle).sin() * unit_a + (MIX * angle).sin() * unit_b) / sine.clamp(min=1e-6)
    # Parallel vectors have no arc between them, opposite ones no shortest one.
    mixed = torch.where(sine < 1e-4, unit_b, mixed)
    kept = round(RETAINED * a.shape[2])
    differ = angle.topk(kept, dim=2).indices.expand(-1, -1, -1, a.shape[3])
    restored = []
    for vectors, length in ((a, length_a), (b, length_b)):
        light = mixed * length
        restored.append(light.scatter(2, differ, vectors.gather(2, differ)).to(lower.dtype))
    return restored[0], restored[1]


def merge(cache: DynamicCache, first: int) -> None:
    """Merge the layers from ``first`` on, two by two from the last, in place."""
    for upper in range(len(cache.layers) - 1, first, -2):
        low, high = cache.layers[upper - 1], cache.layers[upper]
        low.keys, high.keys = merge_pair(low.keys, high.keys)
        low.values, high.values = merge_pair(low.values, high.values)


def memory_share(layers: int, first: int, dim: int) -> float:
    """Of the full cache: a merged pair keeps a direction, two lengths and the retained vectors of both."""
    merged = (layers - first) // 2 * 2
    pair = 1 + 2 / dim + 2 * RETAINED
    return (layers - merged + merged / 2 * pair) / layers


def first_for(layers: int, dim: int, share: float) -> int:
    """The highest first layer whose memory share is at most ``share``; 0 if none is."""
    fits = (first for first in range(layers, -1, -1) if memory_share(layers, first, dim) <= share)
    return next(fits, 0)
