"""Where the rows of a layer are, when every request has layers of its own that are lazy.

One flat K and one flat V tensor hold all layers of all requests. A *bank* is a range of rows big enough for
every slot of one of SGLang's two allocators:

    | full bank 0 .. P-1 | streaming bank 0 .. L-P-1 | staging bank 0 .. L-P-1 | scratch |

A table [layer set, layer] says which bank holds a layer of a request: 0 .. P-1 are the full banks, P .. L-1
the streaming ones. Any set of P layers then costs the same memory, so admission never depends on decisions.

    full bank        row = full slot of the position             (SGLang's full allocator; row 0: padding)
    streaming bank   row = streaming slot of the position, or a row of the request's sink set
    staging bank     row = position; the one request between chunks that is not decided yet
    scratch          row = index of the token in the batch; undecided requests, while a layer is attended
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROWS = 2**31 - 1  # FlashInfer's indices are int32


@dataclass(frozen=True)
class BankLayout:
    """Sizes in rows (tokens of one layer).

    full_banks: P. streaming_banks: L - P. full_rows, streaming_rows: of one bank, padding and sink rows
    included. staging_rows: longest undecided prefix. scratch_rows: most tokens of a prefill batch.
    sink_base: first row of sink set 0 within a streaming bank.
    """

    full_banks: int
    streaming_banks: int
    full_rows: int
    streaming_rows: int
    staging_rows: int
    scratch_rows: int
    sink_base: int

    @property
    def layers(self) -> int:
        """L."""
        return self.full_banks + self.streaming_banks

    @property
    def streaming_start(self) -> int:
        """First row of streaming bank 0."""
        return self.full_banks * self.full_rows

    @property
    def staging_start(self) -> int:
        """First row of staging bank 0."""
        return self.streaming_start + self.streaming_banks * self.streaming_rows

    @property
    def scratch_start(self) -> int:
        """First scratch row."""
        return self.staging_start + self.streaming_banks * self.staging_rows

    @property
    def total_rows(self) -> int:
        """Rows of the flat tensors."""
        return self.scratch_start + self.scratch_rows

    def bank_start(self, bank: int) -> int:
        """First row of a bank of the layer table (0 .. L-1)."""
        if bank < self.full_banks:
            return bank * self.full_rows
        return self.streaming_start + (bank - self.full_banks) * self.streaming_rows

    def staging_bank_start(self, layer: int) -> int:
        """First staging row of ``layer`` (P .. L-1)."""
        return self.staging_start + (layer - self.full_banks) * self.staging_rows
