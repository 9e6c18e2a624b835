"""Where a position is in a bank (memory/banks.py), for kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def streaming_bank_start(  # type: ignore[no-untyped-def]
    bank, FULL_BANKS: tl.constexpr, streaming_start, streaming_rows
):
    """As ``BankLayout.bank_start`` of a streaming bank."""
    return streaming_start + (bank - FULL_BANKS) * streaming_rows


@triton.jit
def bank_row(  # type: ignore[no-untyped-def]
    bank, full, streaming, FULL_BANKS: tl.constexpr, full_rows, streaming_start, streaming_rows
):
    """The row of a position in ``bank``, given its slots in full and in streaming banks."""
    lazy = streaming_bank_start(bank, FULL_BANKS, streaming_start, streaming_rows) + streaming
    return tl.where(bank < FULL_BANKS, bank * full_rows + full, lazy)
