"""SGLang's pools and our allocator of a few full and lazy layers, small and on a CPU, for every test rig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.runtime_context import publish, reset_context
from sglang.srt.server_args import ServerArgs

from lt_sglang.memory.allocator import ElasticAllocator
from lt_sglang.memory.banks import BankLayout
from lt_sglang.memory.demand import Demand
from lt_sglang.memory.flat_pool import FlatPool, flat_pool_class
from lt_sglang.memory.sinks import SinkStore
from lt_sglang.memory.units import UnitList, UnitShape

ONE_EACH = UnitShape(1, 1)


@dataclass
class Pools:
    """rows: req_to_token. kv: the pools. flat: their memory. allocator: of their slots. sinks: sink sets."""

    rows: ReqToTokenPool
    kv: SWAKVPool
    flat: FlatPool
    allocator: ElasticAllocator
    sinks: SinkStore

    def cache_params(self, window: int, disable: bool = False) -> CacheInitParams:
        """Of a prefix cache over them; ``window``: SGLang's sliding_window_size."""
        return CacheInitParams(
            disable=disable,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=self.allocator.page_size,
            sliding_window_size=window,
            tree_components=(ComponentType.FULL, ComponentType.SWA),
        )


def make_pools(  # noqa: PLR0913
    units: int,
    sink_sets: int,
    sink_tokens: int,
    *,
    requests: int,
    context: int,
    shape: UnitShape = ONE_EACH,
    page_size: int = 1,
    window: int = 8,
    full_limit: int | None = None,
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Pools:
    """Memory of ``units`` units, in a context as a scheduler of SGLang's has.

    Args:
        units: of ``page_size`` tokens.
        sink_sets: most sets of sinks.
        sink_tokens: slots of one.
        requests: rows of req_to_token.
        context: its columns.
        shape: of the layers; full ones come first.
        page_size: SGLang's.
        window: tokens that a window keeps, for admission.
        full_limit: most full slots in use, or None.
        dtype: of K and V, one head of one element.
        arguments: ServerArgs' fields.
    """
    reset_context()
    publish(ServerArgs(model_path="dummy", device="cpu", page_size=page_size, **arguments), role="scheduler")
    rows = ReqToTokenPool(size=requests, max_context_len=context, device="cpu", enable_memory_saver=False)
    free = UnitList(units, page_size, shape.parts, "cpu")
    flat = FlatPool(BankLayout(shape, free.rows), free)
    kv = SWAKVPool(
        size=free.rows - page_size,
        size_swa=free.rows - page_size,
        page_size=page_size,
        dtype=dtype,
        head_num=1,
        head_dim=1,
        swa_attention_layer_ids=list(range(shape.full_layers, shape.layers)),
        full_attention_layer_ids=list(range(shape.full_layers)),
        device="cpu",
        token_to_kv_pool_class=flat_pool_class(MHATokenToKVPool, flat),
    )
    demand = Demand(shape, page_size, window, 1, arguments.get("chunked_prefill_size") or context, context)
    allocator = ElasticAllocator(free, shape, demand, dtype, kv, full_limit)
    store = SinkStore(sink_sets, sink_tokens, rows.req_to_token.shape[0], "cpu", allocator.sinks)
    allocator.sink_store = store
    return Pools(rows, kv, flat, allocator, store)
