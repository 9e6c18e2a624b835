"""Static mode where a token takes more than one unit: a list of slots as rows of each of its units.

A slot is the token's row in its first unit (memory/units.py). Layers in other units read lists of their own,
as long and in the same order, so they run the same plan.
"""

from __future__ import annotations

from typing import Any

import torch

from lt_sglang.attention.flashinfer_private import use_kv_indices
from lt_sglang.memory.flat_pool import FlatPool


class LayerParts:
    """In which unit each layer is.

    Args:
        pool: of all layers.
        lazy_layers: the served list.
    """

    def __init__(self, pool: FlatPool, lazy_layers: tuple[int, ...]) -> None:
        shape = pool.layout.shape
        full_layers = [layer for layer in range(shape.layers) if layer not in lazy_layers]
        banks = {layer: bank for bank, layer in enumerate([*full_layers, *lazy_layers])}
        self.full_units, self.streaming_units = shape.full_units, shape.streaming_units
        self._part = {layer: shape.part_of(bank) for layer, bank in banks.items()}
        self._rest = pool.units.rest

    def of(self, layer: int) -> int:
        """0 for the first unit."""
        return self._part[layer]

    def rows(self, slots: torch.Tensor, units: int) -> tuple[torch.Tensor, ...]:
        """Rows of ``slots`` (int, any shape) in each of a token's ``units`` units, same dtype."""
        at = slots if units == 1 else slots.to(torch.int64)
        return (slots, *(self._rest[part - 1][at].to(slots.dtype) for part in range(1, units)))


class DecodeLists:
    """The lists of a decode wrapper whose layers are in several units.

    Args:
        parts: where layers are.
        units: of a token of the wrapper's kind.
    """

    def __init__(self, parts: LayerParts, units: int) -> None:
        self._parts = parts
        self._units = units
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._lists: tuple[torch.Tensor, ...] = ()

    def init_graphs(self, first: torch.Tensor) -> None:
        """Allocate what CUDA graphs read; ``first``: their list of the first unit, int32."""
        self._buffers = (first, *(torch.zeros_like(first) for _ in range(1, self._units)))

    def fill(self, slots: torch.Tensor, count: int, *, graph: bool) -> None:
        """``slots``: int32, the list of the first unit, whose first ``count`` elements are read."""
        if self._units == 1:
            return
        lists = self._parts.rows(slots[:count], self._units)
        if not graph:
            self._lists = (slots, *lists[1:])
            return
        for buffer, rows in zip(self._buffers[1:], lists[1:], strict=True):
            buffer[:count] = rows
        self._lists = self._buffers

    def use(self, wrapper: Any, layer: int) -> None:
        """Let the next run of ``wrapper`` read the list of ``layer``."""
        if self._units > 1:
            use_kv_indices(wrapper, self._lists[self._parts.of(layer)])
