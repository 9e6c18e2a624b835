"""Units: what the KV memory is made of, so that full and lazy layers share one budget.

A *unit* is room for K and V of one page of tokens in g layers, g = gcd(P, L - P) for P full and L - P lazy
layers. A page of tokens takes P / g units for its full layers and (L - P) / g for its lazy ones. All units
are alike, so any free one serves either kind: nothing is split at the start, nothing is ever moved, and no
free memory is out of reach of a request that fits (docs/decisions/kv-units.md).

The buffers are g *lanes* of rows. Unit u is rows u * page_size .. (u + 1) * page_size - 1 of every lane. A
slot, SGLang's number of a token, is its row in the first of its units; where a token has more than one,
``UnitList.rest`` names its rows in the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch


@dataclass(frozen=True)
class UnitShape:
    """How the layers of a model share units. full_layers: P, from 0. lazy_layers: L - P, from 1."""

    full_layers: int
    lazy_layers: int

    @property
    def layers(self) -> int:
        """L."""
        return self.full_layers + self.lazy_layers

    @property
    def lanes(self) -> int:
        """g, layers of a unit."""
        return gcd(self.full_layers, self.lazy_layers)

    @property
    def full_units(self) -> int:
        """Units of a page of tokens in full layers."""
        return self.full_layers // self.lanes

    @property
    def streaming_units(self) -> int:
        """Units of a page of tokens in lazy layers."""
        return self.lazy_layers // self.lanes

    @property
    def parts(self) -> int:
        """Units of a page of one kind, at most."""
        return max(self.full_units, self.streaming_units)

    def lane_of(self, bank: int) -> int:
        """Which lane holds ``bank``: 0 .. P - 1 are the full layers, P .. L - 1 the lazy ones."""
        return self._within(bank) % self.lanes

    def part_of(self, bank: int) -> int:
        """In which of a token's units ``bank`` is."""
        return self._within(bank) // self.lanes

    def units(self, full_pages: int, streaming_pages: int) -> int:
        """Units of so many pages of both kinds."""
        return full_pages * self.full_units + streaming_pages * self.streaming_units

    def _within(self, bank: int) -> int:
        return bank if bank < self.full_layers else bank - self.full_layers


class UnitList:
    """The free units. How many is known on the host, which ones only on the device, so nothing waits.

    Args:
        units: how many there are; unit 0 besides them is SGLang's padding and never handed out.
        page_size: tokens of a unit.
        parts: ``UnitShape.parts``.
        device: of the lists.

    Attributes:
        rest: int32 [parts - 1, rows]: for a slot, its row in the second, third ... of its units.
    """

    def __init__(self, units: int, page_size: int, parts: int, device: str) -> None:
        self.size = units
        self.page_size = page_size
        self.parts = parts
        self.device = device
        self.rest = torch.zeros((parts - 1, self.rows), dtype=torch.int32, device=device)
        self._free: torch.Tensor
        self._given_back: list[torch.Tensor]  # joined to the others when those run short
        self._count: int
        self.clear()

    @property
    def rows(self) -> int:
        """Rows of a lane, padding included."""
        return (self.size + 1) * self.page_size

    def __len__(self) -> int:
        return self._count

    @property
    def free(self) -> torch.Tensor:
        """Numbers of the free units, next to be taken first; int64."""
        if self._given_back:
            self._free = torch.cat((self._free, *self._given_back))
            self._given_back = []
        return self._free

    @free.setter
    def free(self, numbers: torch.Tensor) -> None:
        self._free, self._given_back, self._count = numbers, [], len(numbers)

    def take(self, pages: int, parts: int) -> torch.Tensor:
        """First units of ``pages`` pages of ``parts`` units each, int64 [pages]; so many must be free."""
        end = pages * parts
        free = self._free if end <= len(self._free) else self.free
        first = free[:pages]
        if parts > 1 and pages:
            others = free[pages:end].view(parts - 1, pages)
            self.rest[: parts - 1, self._rows_of(first)] = self._rows_of(others).to(torch.int32)
        self._free = free[end:]
        self._count -= end
        return first

    def give(self, first: torch.Tensor, parts: int) -> None:
        """Take back pages, given their first units."""
        units = [first.to(torch.int64, copy=True)]  # it may be part of a table
        if parts > 1 and len(first):
            others = self.rest[: parts - 1, first * self.page_size] // self.page_size
            units.append(others.to(torch.int64).flatten())
        self._given_back += units
        self._count += sum(map(len, units))

    def rows_in_parts(self, slots: torch.Tensor, parts: int) -> torch.Tensor:
        """Rows of ``slots`` (int64 [n]) in each of their ``parts`` units now; int64 [parts, n]."""
        return torch.stack([slots, *(self.rest[part, slots].to(torch.int64) for part in range(parts - 1))])

    def clear(self) -> None:
        """All are free."""
        self.free = torch.arange(1, self.size + 1, dtype=torch.int64, device=self.device)

    def _rows_of(self, units: torch.Tensor) -> torch.Tensor:
        offset = torch.arange(self.page_size, device=self.device)
        return (units[..., None] * self.page_size + offset).flatten(-2)
