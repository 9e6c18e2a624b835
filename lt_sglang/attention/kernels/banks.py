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
    """What a kernel is told of the banks; names as in BankLayout and LayerSetStore."""

    bank_of: torch.Tensor
    set_of: torch.Tensor
    full_rows: int
    streaming_start: int
    streaming_rows: int
    staging_start: int
    staging_rows: int
    scratch_start: int
    sink_base: int


@dataclass(frozen=True)
class LayerBanks:
    """Which bank holds each layer of each request, and where banks and sinks are.

    bank_of: int32 [capacity, L], bank of each layer of a layer set. set_of: int32 [request rows], layer set
    of the request in a row of req_to_token.
    """

    bank_of: torch.Tensor
    set_of: torch.Tensor
    layout: BankLayout
    windows: Windows

    @cached_property
    def args(self) -> BankArgs:
        """The same for kernels, beside the constants LAYERS, FULL_BANKS, SINK and RECENT."""
        layout = self.layout
        return BankArgs(
            bank_of=self.bank_of,
            set_of=self.set_of,
            full_rows=layout.full_rows,
            streaming_start=layout.streaming_start,
            streaming_rows=layout.streaming_rows,
            staging_start=layout.staging_start,
            staging_rows=layout.staging_rows,
            scratch_start=layout.scratch_start,
            sink_base=self.windows.sink_base,
        )


@triton.jit
def streaming_bank_start(banks, bank, FULL_BANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """As ``BankLayout.bank_start`` of a streaming bank."""
    return banks.streaming_start + (bank - FULL_BANKS) * banks.streaming_rows


@triton.jit
def bank_row(banks, bank, full, streaming, FULL_BANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of a position in ``bank``, given its slots in full and in streaming banks."""
    lazy = streaming_bank_start(banks, bank, FULL_BANKS) + streaming
    return tl.where(bank < FULL_BANKS, bank * banks.full_rows + full, lazy)
