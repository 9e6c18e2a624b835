"""The flat K and V tensors behind all banks, and SGLang's pools as views of them.

SGLang's own pools stay what its allocators, checks and reports expect; their per-layer buffers become slices
of one tensor, so that one attention call can read a different bank for every request.

Source: sglang/srt/mem_cache/memory_pool.py, MHATokenToKVPool._create_buffers_normal.
"""

from __future__ import annotations

from typing import Any

import torch

from lt_sglang.errors import LightTransferError
from lt_sglang.memory.banks import MAX_ROWS, BankLayout
from lt_sglang.memory.kv import KV


class FlatPool:
    """The K and V of a layout's banks; allocated when the first of SGLang's pools asks for its buffers."""

    def __init__(self, layout: BankLayout) -> None:
        if layout.total_rows > MAX_ROWS:
            raise LightTransferError(
                f"KV pools: {layout.total_rows} rows in all layers are more than FlashInfer can index "
                f"({MAX_ROWS}); lower --mem-fraction-static or --max-total-tokens"
            )
        self.layout = layout
        self._buffers: KV | None = None
        self._taken = 0

    @property
    def complete(self) -> bool:
        """Whether every bank has been taken."""
        return self._taken == self.layout.staging_start

    @property
    def kv(self) -> KV:
        """Every bank: layout.total_rows rows of the KV cache's dtype; row 0 of a bank is padding."""
        assert self._buffers is not None
        return self._buffers

    def take(
        self, banks: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: str
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The next ``banks`` banks of ``rows`` rows as K and V buffers; full banks are taken first."""
        if self._buffers is None:
            whole = (self.layout.total_rows, *shape)
            self._buffers = KV(
                torch.zeros(whole, dtype=dtype, device=device),
                torch.zeros(whole, dtype=dtype, device=device),
            )
        expected = self.layout.bank_start(0 if self._taken == 0 else self.layout.full_banks)
        if self._taken != expected or (self._taken == 0 and rows != self.layout.full_rows):
            raise LightTransferError("KV pools: SGLang built its pools in an unexpected order or size")
        starts = [self._taken + bank * rows for bank in range(banks)]
        self._taken += banks * rows
        k, v = self._buffers
        return [k[at : at + rows] for at in starts], [v[at : at + rows] for at in starts]


def flat_pool_class(pool_class: type, flat: FlatPool) -> type:
    """``pool_class`` (an MHATokenToKVPool) whose buffers are banks of ``flat``."""
    base: Any = pool_class

    class FlatKVPool(base):
        def _create_buffers_normal(self) -> None:
            k_shape, v_shape = self._kv_buffer_shapes()
            if self.kv_cache_layout != "nhd" or k_shape != v_shape:
                raise LightTransferError(
                    f"KV pools: dynamic mode needs the NHD layout, SGLang chose {self.kv_cache_layout}"
                )
            self.k_buffer, self.v_buffer = flat.take(
                self.layer_num, k_shape[0], tuple(k_shape[1:]), self.store_dtype, self.device
            )

    FlatKVPool.__name__ = FlatKVPool.__qualname__ = f"Flat{pool_class.__name__}"  # for SGLang's logs
    return FlatKVPool
