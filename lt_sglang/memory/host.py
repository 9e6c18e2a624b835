"""Host memory of the prefix cache: SGLang's HiCache over the units of memory/units.py.

HiCache keeps cached tokens in host memory when they are evicted from the device, and copies them back when a
prompt hits them. Its host pools are told how many tokens they hold; ours share units, as the device's do, so
nothing says in advance how much of the host memory is for full layers, for windows and for sinks. A row of a
host lane is a row of a device lane, so every layer is copied as it lies: which layers of a request are lazy
does not matter here.

Source: sglang/srt/mem_cache/pool_host/mha.py and base.py, l2_transfer.py,
hybrid_cache/hybrid_cache_controller.py.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.kernels.ops.kvcache.hicache import (
    can_use_hicache_jit_kernel,
    transfer_hicache_all_layer,
    transfer_hicache_one_layer,
)
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.pool_host.base import HostKVCache, host_memory_budget_bytes
from sglang.srt.mem_cache.pool_host.common import (
    ALLOC_MEMORY_FUNCS,
    get_allocator_from_storage,
    make_kernel_ptr_table,
)

from lt_sglang.errors import LightTransferError
from lt_sglang.memory.allocator import SlotAllocator
from lt_sglang.memory.flat_pool import FlatPool
from lt_sglang.memory.kv import KV
from lt_sglang.memory.units import UnitList

NO_STORAGE = "--hicache-storage-backend: not supported with lazy layers: pages in storage have no sinks"


class HostMemory:
    """K and V lanes in host memory, pinned where the device is a GPU, and the units they are made of.

    Args:
        device: the lanes that are backed up.
        units: how many units, padding aside.

    Attributes:
        units: which are free; host numbers, as all tables of them.
        kv: every lane, [lanes * rows, heads, dim], the device's dtype.
    """

    def __init__(self, device: FlatPool, units: int) -> None:
        shape, page = device.layout.shape, device.units.page_size
        self.lanes = shape.lanes
        self._of_device = device.kv
        k = device.kv.k
        self.on_gpu = k.is_cuda
        self._row = k[0].numel()
        self._row_bytes = self._row * k.element_size()
        self.unit_bytes = device.unit_bytes
        wanted = (units + 1) * self.unit_bytes
        room = host_memory_budget_bytes(wanted)
        if wanted > room:
            raise LightTransferError(
                f"--hicache-size, --hicache-ratio: {wanted / 1e9:.2f} GB of host memory on this rank, "
                f"and only {max(room, 0) / 1e9:.2f} GB are free (10 GiB are left to the machine)"
            )
        self.units = UnitList(units, page, shape.parts, "cpu")
        self.kv = KV(*(self._allocate(part, page * self.lanes * self._row_bytes) for part in device.kv))
        self._lanes_of = {side: self._lanes(kv) for side, kv in (("host", self.kv), ("device", device.kv))}
        self._page = page
        if self.on_gpu and not can_use_hicache_jit_kernel(page_size=page, element_size=self._row_bytes):
            raise LightTransferError(
                f"--enable-hierarchical-cache: SGLang's copying kernel takes no rows of {self._row_bytes} "
                "bytes (K of one token in one layer, on one rank)"
            )
        self._pointers = {}
        if self.on_gpu:
            self._pointers = {
                side: [
                    make_kernel_ptr_table(list(lanes), k.device, host_memory_registered=side == "host")
                    for lanes in pair
                ]
                for side, pair in self._lanes_of.items()
            }

    def _allocate(self, like: torch.Tensor, step: int) -> torch.Tensor:
        dims = (self.lanes * self.units.rows, *like.shape[1:])
        if not self.on_gpu:
            return torch.empty(dims, dtype=like.dtype)
        buffer: torch.Tensor = ALLOC_MEMORY_FUNCS[like.device.type](
            dims,
            dtype=like.dtype,
            device="cpu",
            pin_memory=True,
            allocator=get_allocator_from_storage("default"),
            registration_granularity_bytes=step,
        )
        return buffer

    def _lanes(self, kv: KV) -> KV:
        return KV(*(part.view(self.lanes, -1, self._row) for part in kv))

    def moved(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` (int64, on the host) where the copying kernels read them; nothing waits."""
        if not self.on_gpu:
            return rows
        return rows.pin_memory().to(self._of_device.k.device, non_blocking=True)

    def back_up(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """Copy rows ``device`` of every lane to rows ``host`` (int64 [n], both as ``moved``)."""
        self._copy_all("host", host, "device", device)

    def restore(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """The inverse of ``back_up``."""
        self._copy_all("device", device, "host", host)

    def restore_lane(self, lane: int, host: torch.Tensor, device: torch.Tensor) -> None:
        """As ``restore``, of one lane."""
        (to_k, to_v), (from_k, from_v) = self._lanes_of["device"], self._lanes_of["host"]
        if not self.on_gpu:
            to_k[lane, device], to_v[lane, device] = from_k[lane, host], from_v[lane, host]
        else:
            transfer_hicache_one_layer(
                to_k[lane],
                to_v[lane],
                device,
                from_k[lane],
                from_v[lane],
                host,
                element_dim=self._row,
                page_size=self._page,
            )

    def _copy_all(self, to: str, target: torch.Tensor, source_side: str, source: torch.Tensor) -> None:
        if not self.on_gpu:
            for written, read in zip(self._lanes_of[to], self._lanes_of[source_side], strict=True):
                written[:, target] = read[:, source]
            return
        (to_k, to_v), (from_k, from_v) = self._pointers[to], self._pointers[source_side]
        transfer_hicache_all_layer(
            to_k,
            to_v,
            target,
            from_k,
            from_v,
            source,
            kv_cache_src_stride_bytes=self._row_bytes,
            kv_cache_dst_stride_bytes=self._row_bytes,
            element_size=self._row_bytes,
            page_size=self._page,
        )


class HostPool(HostKVCache):
    """SGLang's host pool of one kind of layers, over HostMemory.

    Args:
        memory: shared with the pool of the other kind.
        device: the lanes that are backed up.
        banks: those of this kind (memory/banks.py), in the order of SGLang's layers of the kind.
        name: for SGLang's logs.
        flags: bool [slots], on the device, one for each slot of this kind, kept with it; or None.
    """

    def __init__(
        self, memory: HostMemory, device: FlatPool, banks: range, name: str, flags: torch.Tensor | None = None
    ) -> None:
        shape, page = device.layout.shape, device.units.page_size
        self._memory = memory
        self._device = device
        self._places = [(shape.part_of(bank), shape.lane_of(bank)) for bank in banks]
        self.parts = 1 + max(part for part, _ in self._places)
        self._slots = SlotAllocator(memory.units, self.parts, memory.kv.k.dtype, None)
        # The device's, and those that are kept, by host slot.
        self._flags = None if flags is None else (flags, flags.new_zeros(memory.units.rows))
        self.layer_num = self.target_layer_num = len(banks)
        super().__init__(
            dtype=memory.kv.k.dtype,
            device_capacity_tokens=self._slots.size,
            size_per_token=self.get_size_per_token(),
            start_layer=0,
            end_layer=len(banks) - 1,
            host_to_device_ratio=1,
            host_size=0,
            page_size=page,
            layout="layer_first",
            pin_memory=memory.on_gpu,
            device="cpu",
            pool_label=name,
            host_token_capacity=self._slots.size,
        )

    def get_size_per_token(self) -> int:
        """Bytes of a token in the layers of this kind."""
        return self.parts * self._memory.unit_bytes // self._memory.units.page_size

    def _allocate_host_buffer(self) -> None:
        self.kv_buffer = self.init_kv_buffer()
        self.fd = None

    def init_kv_buffer(self) -> list[torch.Tensor]:
        """The shared lanes: SGLang unpins what it finds here."""
        return list(self._memory.kv)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """``need_size`` host slots (whole pages), int64; None if there are fewer."""
        return self._slots.alloc(need_size)

    def free(self, indices: torch.Tensor) -> int:
        """Take them back; how many."""
        self._slots.free(indices.cpu())
        return len(indices)

    def available_size(self) -> int:
        """Slots that can be had now if the other kind takes none."""
        return self._slots.available_size()

    def clear(self) -> None:
        """All are free; its owner clears the pool of the other kind as well."""
        self._memory.units.clear()
        self._slots.clear()

    @property
    def used(self) -> int:
        """Slots in use."""
        return self._slots.used

    def rows_in_parts(self, slots: torch.Tensor) -> torch.Tensor:
        """As UnitList, of slots of this pool."""
        return self._slots.rows_in_parts(slots)

    def moved_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """The same, where the copying kernels read them."""
        return self._memory.moved(self.rows_in_parts(slots))

    def prepare_transfer_indices(
        self, host_indices: torch.Tensor, device_indices: torch.Tensor, io_backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As HostKVCache; ``host_indices`` are rows (HostController), device slots become rows here."""
        return host_indices, self._device.units.rows_in_parts(device_indices, self.parts)

    def backup_from_device_all_layer(
        self, device_pool: Any, host_indices: torch.Tensor, device_indices: torch.Tensor, io_backend: str
    ) -> None:
        """As HostKVCache; both are rows, int64 [units, n]."""
        for host, device in zip(host_indices, device_indices, strict=True):
            self._memory.back_up(host, device)
        if self._flags is not None:
            flags, kept = self._flags
            kept[host_indices[0]] = flags[device_indices[0]]

    def load_to_device_per_layer(
        self,
        device_pool: Any,
        host_indices: torch.Tensor,
        device_indices: torch.Tensor,
        layer_id: int,
        io_backend: str,
        *,
        is_draft: bool = False,
    ) -> None:
        """As HostKVCache; both are rows, int64 [units, n]."""
        part, lane = self._places[layer_id]
        self._memory.restore_lane(lane, host_indices[part], device_indices[part])
        if layer_id == 0 and self._flags is not None:
            flags, kept = self._flags
            flags[device_indices[0]] = kept[host_indices[0]]

    def get_data_page(self, index: Any, flat: bool = True) -> torch.Tensor:
        """Not supported: storage back ends ask for it."""
        raise LightTransferError(NO_STORAGE)

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Not supported: storage back ends ask for it."""
        raise LightTransferError(NO_STORAGE)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Not supported: storage back ends ask for it."""
        raise LightTransferError(NO_STORAGE)


class HostController(HybridCacheController):
    """HybridCacheController whose host slots become rows while they are on the host."""

    def _move_pool_indices(
        self,
        host_pool: Any,
        host_indices: torch.Tensor,
        device_indices: torch.Tensor,
        *,
        write_back_jit: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return host_pool.moved_rows(host_indices), device_indices
