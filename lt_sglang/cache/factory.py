"""The prefix cache named ``lighttransfer``: one a mode."""

from __future__ import annotations

from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from lt_sglang.cache.radix_dynamic import DynamicRadixCache
from lt_sglang.cache.radix_static import LightTransferRadixCache


def create(ctx: TreeCacheBuildContext) -> UnifiedRadixCache:
    """Factory for ``register_radix_cache_backend``; serves requests with and without lazy layers."""
    runner = ctx.tp_worker.model_runner
    store = getattr(runner, "sink_store", None)
    if store is None:
        return create_unified_radix_cache(ctx)

    def build(params: CacheInitParams) -> LightTransferRadixCache:
        cache = (
            LightTransferRadixCache(params, store, runner.lt_config.lazy_layers)
            if runner.prefills is None
            else DynamicRadixCache(params, store, runner.prefills, runner.full_rows)
        )
        cache.flush_sinks = runner.flush_sinks
        return cache

    return create_unified_radix_cache(ctx, cache_class=build)
