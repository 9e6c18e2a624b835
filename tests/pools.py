"""SGLang's pools and allocator of one full and one lazy layer, small and on a CPU, for every test rig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.runtime_context import publish, reset_context
from sglang.srt.server_args import ServerArgs

from lt_sglang.memory.sinks import SinkStore


@dataclass
class Pools:
    """rows: req_to_token. kv: the pools. allocator: of their slots. sinks: the sets behind those."""

    rows: ReqToTokenPool
    kv: SWAKVPool
    allocator: SWATokenToKVPoolAllocator
    sinks: SinkStore

    def cache_params(self, window: int, disable: bool = False) -> CacheInitParams:
        """Of a prefix cache over them; ``window``: SGLang's sliding_window_size."""
        return CacheInitParams(
            disable=disable,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
            sliding_window_size=window,
            tree_components=(ComponentType.FULL, ComponentType.SWA),
        )


def make_pools(
    full: int,
    streaming: int,
    sink_sets: int,
    sink_tokens: int,
    *,
    requests: int,
    context: int,
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Pools:
    """Pools of ``full`` and ``streaming`` slots and sink sets, in a context as a scheduler of SGLang's has.

    Args:
        full: slots of the full pool.
        streaming: slots of the streaming pool.
        sink_sets: sets of sink rows.
        sink_tokens: rows of one.
        requests: rows of req_to_token.
        context: its columns.
        dtype: of K and V, one head of one element.
        arguments: ServerArgs' fields.
    """
    reset_context()
    publish(ServerArgs(model_path="dummy", device="cpu", page_size=1, **arguments), role="scheduler")
    rows = ReqToTokenPool(size=requests, max_context_len=context, device="cpu", enable_memory_saver=False)
    kv = SWAKVPool(
        size=full,
        size_swa=streaming + sink_sets * sink_tokens,
        page_size=1,
        dtype=dtype,
        head_num=1,
        head_dim=1,
        swa_attention_layer_ids=[1],
        full_attention_layer_ids=[0],
        device="cpu",
    )
    kv.size_swa = streaming
    allocator = SWATokenToKVPoolAllocator(full, streaming, 1, dtype, "cpu", kv, need_sort=False)
    return Pools(rows, kv, allocator, SinkStore(sink_sets, sink_tokens, rows.req_to_token.shape[0], "cpu"))
