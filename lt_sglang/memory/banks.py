"""Where the rows of a layer are, when every request has layers of its own that are lazy.

One flat K and one flat V tensor hold all layers of all requests, as the lanes of memory/units.py:

    | lane 0 | lane 1 | ... | lane g - 1 |

A *bank* is what one layer of a request occupies: banks 0 .. P - 1 are full ones, P .. L - 1 streaming ones. A
table [layer set, layer] says which bank holds a layer of a request. Any set of P layers then costs the same
memory, so admission never depends on decisions. A bank is in one lane and one of a token's units:

    full bank        row = full slot of the position, through ``UnitList.rest`` if not in the first unit
    streaming bank   the same with its streaming slot, or with a slot of the request's sink set
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lt_sglang.memory.units import UnitShape

MAX_ROWS = 2**31 - 1  # FlashInfer's indices are int32


@dataclass(frozen=True)
class BankLayout:
    """shape: of the units. rows: of one lane (tokens of one layer), padding included."""

    shape: UnitShape
    rows: int

    @property
    def full_banks(self) -> int:
        """P."""
        return self.shape.full_layers

    @property
    def streaming_banks(self) -> int:
        """L - P."""
        return self.shape.lazy_layers

    @property
    def layers(self) -> int:
        """L."""
        return self.shape.layers

    @property
    def total_rows(self) -> int:
        """Rows of the flat tensors."""
        return self.shape.lanes * self.rows

    def bank_start(self, bank: int) -> int:
        """First row of the lane of a bank of the layer table (0 .. L-1)."""
        return self.shape.lane_of(bank) * self.rows

    def bank_rows(self, bank: int, slots: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """Rows of ``slots`` (int64 [n], full or streaming ones) in ``bank``.

        rest: ``UnitList.rest``.
        """
        part = self.shape.part_of(bank)
        rows = slots if part == 0 else rest[part - 1, slots].to(torch.int64)
        return self.bank_start(bank) + rows
