"""KV pools of hybrid models: one memory for full and lazy layers (memory/units.py).

Source: sglang/srt/mem_cache/kv_cache_configurator.py, sglang/srt/model_executor/pool_configurator.py.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig
from sglang.srt.runtime_context import get_memory, get_parallel, get_schedule

from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.allocator import ElasticAllocator
from lt_sglang.memory.banks import BankLayout
from lt_sglang.memory.flat_pool import FlatPool, flat_pool_class
from lt_sglang.memory.sizes import Sizes, size_memory
from lt_sglang.memory.units import UnitList, UnitShape

logger = logging.getLogger(__name__)


class LightTransferKVCacheConfigurator(KVCacheConfigurator):
    """Sizes and builds the pools of a model with lazy layers.

    Attributes:
        lt_config: the configuration being served.
        sizes: those in force, set by config_from_budget.
        flat_pool: the tensors that hold all layers, set as the pools are built.
    """

    lt_config: LightTransferConfig
    sizes: Sizes | None
    flat_pool: FlatPool | None

    @classmethod
    def adopt(
        cls, stock: KVCacheConfigurator, config: LightTransferConfig
    ) -> LightTransferKVCacheConfigurator:
        """Rebuild SGLang's own configurator as this class, field by field."""
        fields = {f.name: getattr(stock, f.name) for f in dataclasses.fields(stock) if f.init}
        adopted = cls(**fields)
        adopted.lt_config = config
        adopted.sizes = None
        adopted.flat_pool = None
        return adopted

    @property
    def unit_shape(self) -> UnitShape:
        """How the layers share units."""
        layers = self.layer_info
        return UnitShape(len(layers.full_attention_layer_ids), len(layers.swa_attention_layer_ids))

    @property
    def token_layer_bytes(self) -> int:
        """Bytes of K and V of one token in one layer, on this rank."""
        model = self.model_config
        heads = model.get_num_kv_heads(get_parallel().attn_tp_size)
        return int(heads * (model.head_dim + model.v_head_dim) * self.kv_cache_dtype.itemsize)

    def _batch_tokens(self) -> int:
        """Most tokens of one prefill batch."""
        schedule = get_schedule()
        chunk = schedule.chunked_prefill_size
        if chunk is None or chunk <= 0:
            return max(int(self.model_config.context_len), int(schedule.max_prefill_tokens))
        return int(chunk)

    def config_from_budget(self, budget_bytes: int, *, cap_tokens: int | None = None) -> MemoryPoolConfig:
        """As KVCacheConfigurator; ``--max-total-tokens`` caps the tokens of full layers."""
        user_limit = get_schedule().max_total_tokens
        limits = [limit for limit in (user_limit, cap_tokens) if limit is not None]
        shape = self.unit_shape
        if not shape.full_layers and user_limit is not None:
            raise LightTransferError(
                "--max-total-tokens: not used when every layer is lazy; set --mem-fraction-static"
            )
        context = int(self.model_config.context_len)
        if self.lt_config.kv_bytes is not None:
            budget_bytes = min(budget_bytes, self.lt_config.kv_bytes)
        self.sizes = size_memory(
            budget_bytes,
            shape,
            self.lt_config,
            token_layer_bytes=self.token_layer_bytes,
            page_size=int(get_schedule().page_size),
            chunk_tokens=min(self._batch_tokens(), context),
            context_tokens=context,
            interval=max(1, envs.SGLANG_SWA_EVICTION_INTERVAL.get()),
            full_limit=min(limits) if limits else None,
        )
        logger.info(f"LightTransfer KV memory: {self.sizes.describe()}")
        return MemoryPoolConfig(
            max_total_num_tokens=self.sizes.longest,
            full_max_total_num_tokens=self.sizes.longest,
            swa_max_total_num_tokens=self.sizes.streaming_slots,
        )

    def _build_hybrid_swa_kv_pool(
        self,
        *,
        full_max_total_num_tokens: int | None,
        swa_max_total_num_tokens: int | None,
        mha_pool_class: type,
    ) -> Any:
        assert self.sizes is not None
        sizes, page = self.sizes, self.pool_page_size
        units = UnitList(sizes.units, page, sizes.shape.parts, self.device)
        self.flat_pool = FlatPool(BankLayout(sizes.shape, units.rows), units)
        pool = super()._build_hybrid_swa_kv_pool(
            full_max_total_num_tokens=units.rows - page,
            swa_max_total_num_tokens=units.rows - page,
            mha_pool_class=flat_pool_class(mha_pool_class, self.flat_pool),
        )
        pool.size, pool.size_swa = sizes.longest, sizes.streaming_slots
        return pool

    def _build_token_to_kv_pool_allocator(
        self,
        *,
        sizes: Any,
        token_to_kv_pool: Any,
        is_dsv4_model: bool,
        req_to_token_pool: Any,
        token_to_kv_pool_allocator: Any,
    ) -> Any:
        if token_to_kv_pool_allocator is not None or get_memory().enable_hisparse:
            raise LightTransferError(
                "KV pools: draft workers and HiSparse are not supported with lazy layers"
            )
        assert self.sizes is not None and self.flat_pool is not None
        return ElasticAllocator(
            self.flat_pool.units,
            self.sizes.shape,
            self.sizes.demand,
            self.kv_cache_dtype,
            token_to_kv_pool,
            self.sizes.full_limit,
        )
