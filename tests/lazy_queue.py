"""The max-priority queue of LightTransfer-Test (arXiv 2410.13846): what lt_sglang's must equal."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


class LazyQueue:
    """Holds the layers that keep full attention, at most ``capacity`` of them.

    Layers are pushed in the order in which prefill reaches them. Of layers equally lazy the one with the
    higher index is popped first, so every rank pops the same one.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"capacity: {capacity} is negative")
        self.capacity = capacity
        self._heap: list[tuple[float, int]] = []

    def push(self, layer: int, laziness: float) -> int | None:
        """Add a layer; return the layer that is lazy from now on, None while there is room.

        That may be the pushed layer itself. Raises ValueError if laziness is not a number.
        """
        if math.isnan(laziness):
            raise ValueError(f"layer {layer}: laziness is not a number")
        heapq.heappush(self._heap, (-laziness, -layer))
        if len(self._heap) <= self.capacity:
            return None
        return -heapq.heappop(self._heap)[1]

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers held now, in ascending order."""
        return tuple(sorted(-layer for _, layer in self._heap))


def popped_layers(laziness: Sequence[float], keep: int) -> list[int]:
    """The lazy layers in the order in which they are popped, if layers 0, 1, ... are pushed one by one."""
    queue = LazyQueue(keep)
    popped = [queue.push(layer, value) for layer, value in enumerate(laziness)]
    return [layer for layer in popped if layer is not None]
