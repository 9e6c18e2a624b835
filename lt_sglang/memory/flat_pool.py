"""The flat K and V tensors behind all layers, and SGLang's pools as views of them.

SGLang's own pools stay what its allocators, checks and reports expect; their per-layer buffers become lanes
of one tensor (memory/units.py), so that full and lazy layers share memory and, in dynamic mode, one attention
call can read a different layer for every request.

Source: sglang/srt/mem_cache/memory_pool.py, MHATokenToKVPool._create_buffers_normal and set_kv_buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE

from lt_sglang.errors import LightTransferError
from lt_sglang.memory.banks import MAX_ROWS, BankLayout
from lt_sglang.memory.kv import KV
from lt_sglang.memory.units import UnitList


class FlatPool:
    """K and V of a layout's lanes; allocated when the first of SGLang's pools asks for its buffers.

    Attributes:
        layout: of the lanes.
        units: which of their rows are free, and where the rest of a token is.
    """

    def __init__(self, layout: BankLayout, units: UnitList) -> None:
        if layout.total_rows > MAX_ROWS:
            raise LightTransferError(
                f"KV pools: {layout.total_rows} rows in all layers are more than FlashInfer can index "
                f"({MAX_ROWS}); lower --mem-fraction-static or --max-total-tokens"
            )
        self.layout = layout
        self.units = units
        self._buffers: KV | None = None
        self._taken = 0

    @property
    def complete(self) -> bool:
        """Whether every bank has been taken."""
        return self._taken == self.layout.layers

    @property
    def kv(self) -> KV:
        """Every lane: layout.total_rows rows of the KV cache's dtype; page 0 of a lane is padding."""
        assert self._buffers is not None
        return self._buffers

    @property
    def unit_bytes(self) -> int:
        """K and V of one unit."""
        return sum(part.nbytes for part in self.kv) * self.units.page_size // self.layout.rows

    def take(
        self, banks: int, shape: tuple[int, ...], dtype: torch.dtype, device: str
    ) -> tuple[range, list[torch.Tensor], list[torch.Tensor]]:
        """The next ``banks`` banks and their lanes as K and V buffers; full banks are taken first."""
        if self._buffers is None:
            whole = (self.layout.total_rows, *shape)
            self._buffers = KV(
                torch.zeros(whole, dtype=dtype, device=device),
                torch.zeros(whole, dtype=dtype, device=device),
            )
        taken = range(self._taken, self._taken + banks)
        kinds = (range(self.layout.full_banks), range(self.layout.full_banks, self.layout.layers))
        if taken not in kinds:
            raise LightTransferError("KV pools: SGLang built its pools in an unexpected order or size")
        self._taken += banks
        lanes = [self.lane(bank) for bank in taken]
        return taken, [lane.k for lane in lanes], [lane.v for lane in lanes]

    def lane(self, bank: int) -> KV:
        """K and V of the lane of ``bank``, as views [rows, KV heads, dim]."""
        start = self.layout.bank_start(bank)
        return self.kv.where(slice(start, start + self.layout.rows))

    def rows_of(self, bank: int, slots: torch.Tensor) -> torch.Tensor:
        """Rows of ``slots`` (int64 [n]) within the lane of ``bank``; int64 [n]."""
        part = self.layout.shape.part_of(bank)
        return slots if part == 0 else self.units.rest[part - 1][slots].to(slots.dtype)

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy K and V of rows ``source`` to ``target`` (int64 [n]) in every lane; all are read first."""
        for buffer in self.kv:
            lanes = buffer.view(self.layout.shape.lanes, self.layout.rows, *buffer.shape[1:])
            lanes[:, target] = lanes[:, source]


def flat_pool_class(pool_class: type, flat: FlatPool) -> type:
    """``pool_class`` (an MHATokenToKVPool) whose buffers are lanes of ``flat``."""
    base: Any = pool_class

    class FlatKVPool(base):
        lt_flat = flat

        def _create_buffers_normal(self) -> None:
            k_shape, v_shape = self._kv_buffer_shapes()
            if self.kv_cache_layout != "nhd" or k_shape != v_shape:
                raise LightTransferError(
                    f"KV pools: lazy layers need the NHD layout, SGLang chose {self.kv_cache_layout}"
                )
            with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
                self.lt_banks, self.k_buffer, self.v_buffer = flat.take(
                    self.layer_num, tuple(k_shape[1:]), self.store_dtype, self.device
                )

        def get_kv_size_bytes(self) -> tuple[int, int]:
            """Of this pool's share: its lanes are those of the other kind as well."""
            share = self.layer_num / flat.layout.layers
            return tuple(int(part.nbytes * share) for part in flat.kv)  # type: ignore[return-value]

        def set_kv_buffer(
            self,
            layer: Any,
            loc_info: Any,
            cache_k: torch.Tensor,
            cache_v: torch.Tensor,
            k_scale: Any = None,
            v_scale: Any = None,
            layer_id_override: int | None = None,
            **given: Any,
        ) -> None:
            """As MHATokenToKVPool; ``loc_info`` holds slots."""
            number = layer.layer_id if layer_id_override is None else layer_id_override
            if isinstance(loc_info, torch.Tensor):
                loc_info = flat.rows_of(self.lt_banks[number], loc_info)
            super().set_kv_buffer(
                layer, loc_info, cache_k, cache_v, k_scale, v_scale, layer_id_override, **given
            )

    FlatKVPool.__name__ = FlatKVPool.__qualname__ = f"Flat{pool_class.__name__}"  # for SGLang's logs
    return FlatKVPool
