"""What SGLang's HiCache is built of where layers are lazy: the pools of memory/host.py.

Source: sglang/srt/mem_cache/hybrid_cache/hybrid_pool_assembler.py (build_hybrid_swa_stack, _SwaStrategy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import (
    StackBuildResult,
    StackStrategy,
    build_pool_entry,
)
from sglang.srt.mem_cache.pool_host.group import HostPoolGroup
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.runtime_context import get_memory

from lt_sglang.errors import LightTransferError
from lt_sglang.memory.flat_pool import FlatPool
from lt_sglang.memory.host import HostController, HostMemory, HostPool
from lt_sglang.memory.host_sinks import HostSinks


@dataclass(frozen=True)
class HostTier:
    """What HiCache holds in host memory: its two pools, and sinks, if there are any."""

    memory: HostMemory
    full: HostPool
    streaming: HostPool
    sinks: HostSinks | None

    def describe(self) -> dict[str, int]:
        """For /server_info and metrics; slots of sinks are not counted as streaming ones."""
        sinks = self.sinks
        return {
            "units": self.memory.units.size,
            "units_free": len(self.memory.units),
            "unit_bytes": self.memory.unit_bytes,
            "full_slots_used": self.full.used,
            "streaming_slots_used": self.streaming.used - (0 if sinks is None else sinks.slots),
            "sink_sets": 0 if sinks is None else sinks.sets,
            "sink_sets_used": 0 if sinks is None else len(sinks),
        }

    def bytes_by_kind(self) -> dict[str, int]:
        """Of full and streaming slots and sinks in use; the rest is free, room for further sinks included."""
        told = self.describe()
        sinks = 0 if self.sinks is None else len(self.sinks) * self.sinks.slots_of_set
        held = {
            "full": told["full_slots_used"] * self.full.size_per_token,
            "streaming": told["streaming_slots_used"] * self.streaming.size_per_token,
            "sink": sinks * self.streaming.size_per_token,
        }
        return {**held, "free": self.memory.units.size * self.memory.unit_bytes - sum(held.values())}


class HostStack(StackStrategy):
    """SGLang's door for pools of one's own: it asks for the first strategy that matches."""

    def matches(self, kvcache: Any, components: set[ComponentType]) -> bool:
        """Whether ``kvcache`` lies in our lanes (memory/flat_pool.py)."""
        return (
            isinstance(kvcache, SWAKVPool)
            and hasattr(kvcache.swa_kv_pool, "lt_flat")
            and components == {ComponentType.FULL, ComponentType.SWA}
        )

    def build(self, *, cache: Any, kvcache: Any, params: Any, load_cache_event: Any, **given: Any) -> Any:
        """Host memory, its two pools, the sinks in it, and the controller that copies."""
        flat: FlatPool = kvcache.swa_kv_pool.lt_flat
        allocator = params.token_to_kv_pool_allocator
        shape = flat.layout.shape
        if not shape.full_layers:
            raise LightTransferError(
                "--enable-hierarchical-cache: not supported when every layer is lazy: what is cached of a "
                "prompt is then a window and its sinks"
            )
        units, of_prefix = _units(flat), _units_of_prefix(cache, flat)
        if units < of_prefix:
            raise LightTransferError(
                f"--hicache-size, --hicache-ratio: {units} units of host memory do not hold a window and its "
                f"sinks; at least {of_prefix} do"
            )
        memory = HostMemory(flat, units)
        full = HostPool(memory, flat, range(shape.full_layers), "full", cache.slot_flags)
        streaming = HostPool(memory, flat, range(shape.full_layers, shape.layers), "streaming")
        cache.keep_on_host(
            HostTier(memory, full, streaming, _sinks(cache, memory, streaming, units // of_prefix))
        )
        layers = kvcache.layers_mapping
        mappings = [
            {number: at for number, (at, is_lazy) in layers.items() if is_lazy == lazy}
            for lazy in (False, True)
        ]
        last = len(layers)
        group = HostPoolGroup(
            [
                build_pool_entry(
                    name=PoolName.KV,
                    host_pool=full,
                    device_pool=kvcache.full_kv_pool,
                    layer_mapping=mappings[0],
                    transfer_layer_id_max=last,
                    is_anchor=True,
                    host_evict_fn=lambda n: cache.evict_host(n, ComponentType.FULL),
                ),
                build_pool_entry(
                    name=PoolName.SWA,
                    host_pool=streaming,
                    device_pool=kvcache.swa_kv_pool,
                    layer_mapping=mappings[1],
                    transfer_layer_id_max=last,
                    host_evict_fn=lambda n: _evict_streaming(cache, streaming, n),
                    device_evict_fn=lambda n: cache.evict_for_alloc(EvictParams(swa_num_tokens=n)),
                    device_alloc_fn=allocator.swa_attn_allocator.alloc,
                    device_free_fn=allocator.swa_attn_allocator.free,
                ),
            ]
        )
        settings = get_memory()
        controller = HostController(
            allocator,
            group,
            params.page_size,
            params.tp_cache_group,
            load_cache_event=load_cache_event,
            attn_cp_group=params.attn_cp_cache_group,
            attn_tp_group=params.attn_tp_cache_group,
            pp_group=params.pp_cache_group,
            write_policy=settings.hicache_write_policy,
            io_backend=settings.hicache_io_backend,
            transfer_layer_id_max=last,
            host_memory_mode=settings.hicache_host_memory_mode,
        )
        return StackBuildResult(
            host_pool_group=group,
            cache_controller=controller,
            component_host_pools={ComponentType.FULL: full, ComponentType.SWA: streaming},
            pools_desc="full and lazy layers",
        )


def _units(flat: FlatPool) -> int:
    """Units of host memory that SGLang's flags ask for."""
    settings = get_memory()
    if settings.hicache_size > 0:
        return max(int(settings.hicache_size * 1e9) // flat.unit_bytes - 1, 0)
    return int(flat.units.size * settings.hicache_ratio)


def _units_of_prefix(cache: Any, flat: FlatPool) -> int:
    """Units of the shortest cached prefix that has sinks: a window in all layers, and a set."""
    shape, page = flat.layout.shape, flat.units.page_size
    of_set = shape.units(0, cache.sinks.slots_of_set // page)
    return shape.units(1, 1) * -(-cache.sliding_window_size // page) + of_set


def _sinks(cache: Any, memory: HostMemory, streaming: HostPool, sets: int) -> HostSinks | None:
    """Room for the sinks of every cached prefix."""
    store = cache.sinks
    if not store.sink_tokens:
        return None
    return HostSinks(memory, streaming, sets, store.sink_tokens, store.slots_of_set)


def _evict_streaming(cache: Any, pool: HostPool, tokens: int) -> None:
    """Make room for ``tokens`` of lazy layers on the host: the units that full layers hold serve as well."""
    cache.evict_host(tokens, ComponentType.SWA)
    short = tokens - pool.available_size()
    if short > 0:
        cache.evict_host(short * pool.parts, ComponentType.FULL)
