"""Where a position is in a bank (memory/banks.py), for kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lt_sglang.attention.indices import Windows
from lt_sglang.memory.banks import BankLayout


class BankArgs(NamedTuple):
    """What a kernel is told of the banks.

    bank_of, set_of: as LayerBanks. rest: int32 [parts - 1, rows] (memory/units.py). rows: of a lane.
    """

    bank_of: torch.Tensor
    set_of: torch.Tensor
    rest: torch.Tensor
    rows: int


@dataclass(frozen=True)
class LayerBanks:
    """Which bank holds each layer of each request, and where banks are.

    bank_of: int32 [capacity, L], bank of each layer of a layer set. set_of: int32 [request rows], layer set
    of the request in a row of req_to_token. rest: of the units.
    """

    bank_of: torch.Tensor
    set_of: torch.Tensor
    layout: BankLayout
    rest: torch.Tensor
    windows: Windows

    @cached_property
    def args(self) -> BankArgs:
        """The same for kernels."""
        rest = self.rest if len(self.rest) else self.bank_of  # a pointer is needed; it is not read then
        return BankArgs(self.bank_of, self.set_of, rest, self.layout.rows)

    @cached_property
    def constants(self) -> dict[str, int]:
        """LAYERS, FULL_BANKS, LANES and PARTS of a kernel."""
        shape = self.layout.shape
        return {
            "LAYERS": shape.layers,
            "FULL_BANKS": shape.full_layers,
            "LANES": shape.lanes,
            "PARTS": shape.parts,
        }


@triton.jit
def lane_row(  # type: ignore[no-untyped-def]
    banks, bank, slot, mask, FULL_BANKS: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr
):
    """As ``BankLayout.bank_rows``: the rows, int32, of slots of the bank's kind."""
    within = tl.where(bank < FULL_BANKS, bank, bank - FULL_BANKS)
    row = slot
    if PARTS > 1:
        part = within // LANES
        later = mask & (part > 0)
        row = tl.where(later, tl.load(banks.rest + (part - 1) * banks.rows + slot, mask=later, other=0), slot)
    return (within % LANES) * banks.rows + row


@triton.jit
def bank_row(  # type: ignore[no-untyped-def]
    banks,
    bank,
    full,
    streaming,
    mask,
    FULL_BANKS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The row of a position in ``bank``, given its slots in full and in streaming banks."""
    slot = tl.where(bank < FULL_BANKS, full, streaming)
    return lane_row(banks, bank, slot, mask, FULL_BANKS, LANES, PARTS)
