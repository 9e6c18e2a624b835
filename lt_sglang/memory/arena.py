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


class Arena:
    """The tensors of a layout; allocated when the first pool asks for its buffers.

    Attributes:
        keys, values: [layout.total_rows, kv heads, dim], in the KV cache's dtype; row 0 of a bank is padding.
    """

    def __init__(self, layout: BankLayout) -> None:
        if layout.total_rows > MAX_ROWS:
            raise LightTransferError(
                f"KV pools: {layout.total_rows} rows in all layers are more than FlashInfer can index "
                f"({MAX_ROWS}); lower --mem-fraction-static or --max-total-tokens"
            )
        self.layout = layout
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._taken = 0

    @property
    def complete(self) -> bool:
        """Whether every bank has been taken."""
        return self._taken == self.layout.staging_start

    @property
    def keys(self) -> torch.Tensor:
        """K of every bank."""
        assert self._buffers is not None
        return self._buffers[0]

    @property
    def values(self) -> torch.Tensor:
        """V of every bank."""
        assert self._buffers is not None
        return self._buffers[1]

    def take(
        self, banks: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: str
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The next ``banks`` banks of ``rows`` rows as K and V buffers; full banks are taken first."""
        if self._buffers is None:
            whole = (self.layout.total_rows, *shape)
            self._buffers = (
                torch.zeros(whole, dtype=dtype, device=device),
                torch.zeros(whole, dtype=dtype, device=device),
            )
        expected = self.layout.bank_start(0 if self._taken == 0 else self.layout.full_banks)
        if self._taken != expected or (self._taken == 0 and rows != self.layout.full_rows):
            raise LightTransferError("KV pools: SGLang built its pools in an unexpected order or size")
        starts = [self._taken + bank * rows for bank in range(banks)]
        self._taken += banks * rows
        keys, values = self._buffers
        return [keys[at : at + rows] for at in starts], [values[at : at + rows] for at in starts]


def arena_pool_class(pool_class: type, arena: Arena) -> type:
    """``pool_class`` (an MHATokenToKVPool) whose buffers are banks of ``arena``."""

    base: Any = pool_class

    class ArenaKVPool(base):
        def _create_buffers_normal(self) -> None:
            k_shape, v_shape = self._kv_buffer_shapes()
            if self.kv_cache_layout != "nhd" or k_shape != v_shape:
                raise LightTransferError(
                    f"KV pools: dynamic mode needs the NHD layout, SGLang chose {self.kv_cache_layout}"
                )
            self.k_buffer, self.v_buffer = arena.take(
                self.layer_num, k_shape[0], tuple(k_shape[1:]), self.store_dtype, self.device
            )

    ArenaKVPool.__name__ = ArenaKVPool.__qualname__ = f"Arena{pool_class.__name__}"  # for SGLang's logs
    return ArenaKVPool
