"""KV pools of hybrid models: the split by request length, and the sink rows at the streaming tail.

Source: sglang/srt/mem_cache/kv_cache_configurator.py, sglang/srt/model_executor/pool_configurator.py.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig
from sglang.srt.runtime_context import get_memory, get_parallel, get_schedule

from lt_sglang.config import DEFAULT_EXPECTED_TOKENS, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.banks import BankLayout
from lt_sglang.memory.flat_pool import FlatPool, flat_pool_class
from lt_sglang.memory.split import PoolSplit, SplitInput, split_budget, split_bytes, split_tokens

logger = logging.getLogger(__name__)


class LightTransferKVCacheConfigurator(KVCacheConfigurator):
    """Sizes and builds the pools of a model with lazy layers.

    Attributes:
        lt_config: the configuration being served.
        split: the sizes in force, set by config_from_budget.
        flat_pool: in dynamic mode the tensors that hold every bank, set as the pools are built.
    """

    lt_config: LightTransferConfig
    split: PoolSplit | None
    flat_pool: FlatPool | None

    @classmethod
    def adopt(
        cls, stock: KVCacheConfigurator, config: LightTransferConfig
    ) -> LightTransferKVCacheConfigurator:
        """Rebuild SGLang's own configurator as this class, field by field."""
        fields = {f.name: getattr(stock, f.name) for f in dataclasses.fields(stock) if f.init}
        adopted = cls(**fields)
        adopted.lt_config = config
        adopted.split = None
        adopted.flat_pool = None
        return adopted

    def split_input(self) -> SplitInput:
        """The facts the split is computed from, for this rank."""
        model = self.model_config
        heads = model.get_num_kv_heads(get_parallel().attn_tp_size)
        token_layer = heads * (model.head_dim + model.v_head_dim) * self.kv_cache_dtype.itemsize
        chunk = min(self._batch_tokens(), model.context_len)
        expected = self.lt_config.expected_tokens or min(model.context_len, DEFAULT_EXPECTED_TOKENS)
        streaming_layers = len(self.layer_info.swa_attention_layer_ids)
        undecided = self.lt_config.undecided_rows(model.context_len, self._batch_tokens())
        return SplitInput(
            full_bytes=len(self.layer_info.full_attention_layer_ids) * token_layer,
            streaming_bytes=streaming_layers * token_layer,
            retained_tokens=self.lt_config.retained_tokens,
            sink_tokens=self.lt_config.sink_tokens,
            expected_tokens=expected,
            chunk_tokens=chunk,
            context_tokens=model.context_len,
            expected_output_tokens=self.lt_config.expected_output_tokens,
            eviction_interval=max(1, envs.SGLANG_SWA_EVICTION_INTERVAL.get()),
            staging_bytes=undecided * token_layer,
        )

    def _batch_tokens(self) -> int:
        """Most tokens of one prefill batch."""
        schedule = get_schedule()
        chunk = schedule.chunked_prefill_size
        if chunk is None or chunk <= 0:
            return max(int(self.model_config.context_len), int(schedule.max_prefill_tokens))
        return int(chunk)

    def config_from_budget(self, budget_bytes: int, *, cap_tokens: int | None = None) -> MemoryPoolConfig:
        """As KVCacheConfigurator, with our split; ``--max-total-tokens`` caps the full pool."""
        given = self.split_input()
        user_limit = get_schedule().max_total_tokens
        limits = [limit for limit in (user_limit, cap_tokens) if limit is not None]
        if given.full_bytes == 0 and user_limit is not None:
            raise LightTransferError(
                "--max-total-tokens: not used when every layer is lazy; set --mem-fraction-static"
            )
        split = split_budget(budget_bytes, given)
        if limits and min(limits) < split.full_tokens:
            split = split_tokens(min(limits), given)
        if split_bytes(split, given) > budget_bytes:
            raise LightTransferError(
                f"KV memory: {split_bytes(split, given)} bytes needed, {budget_bytes} available; "
                "raise --mem-fraction-static"
            )
        self.split = split
        self._log(split, given)
        return MemoryPoolConfig(
            max_total_num_tokens=split.full_tokens,
            full_max_total_num_tokens=split.full_tokens,
            swa_max_total_num_tokens=split.streaming_tokens,
        )

    def _log(self, split: PoolSplit, given: SplitInput) -> None:
        full, lazy = self.layer_info.full_attention_layer_ids, self.layer_info.swa_attention_layer_ids
        logger.info(
            f"LightTransfer KV split: full pool {split.full_tokens} tokens, streaming pool "
            f"{split.streaming_tokens} tokens, {split.sink_sets} sink sets of {given.sink_tokens}: "
            f"{split.requests:.1f} requests of {split.expected_tokens} tokens at once ({len(full)} full and "
            f"{len(lazy)} lazy layers, {split_bytes(split, given) / 2**30:.2f} GiB per rank). "
            "Set expected_tokens to prompt + output of your traffic."
        )

    def _build_hybrid_swa_kv_pool(
        self,
        *,
        full_max_total_num_tokens: int | None,
        swa_max_total_num_tokens: int | None,
        mha_pool_class: type,
    ) -> Any:
        assert self.split is not None and swa_max_total_num_tokens is not None
        sink_rows = self.split.sink_sets * self.lt_config.sink_tokens
        if self.lt_config.dynamic:
            assert full_max_total_num_tokens is not None
            layout = self._layout(full_max_total_num_tokens, swa_max_total_num_tokens, sink_rows)
            self.flat_pool = FlatPool(layout)
            mha_pool_class = flat_pool_class(mha_pool_class, self.flat_pool)
        pool = super()._build_hybrid_swa_kv_pool(
            full_max_total_num_tokens=full_max_total_num_tokens,
            swa_max_total_num_tokens=swa_max_total_num_tokens + sink_rows,
            mha_pool_class=mha_pool_class,
        )
        # SGLang must account for the allocator's tokens only.
        pool.size_swa = swa_max_total_num_tokens
        return pool

    def _layout(self, full_tokens: int, streaming_tokens: int, sink_rows: int) -> BankLayout:
        page = self.pool_page_size
        return BankLayout(
            full_banks=len(self.layer_info.full_attention_layer_ids),
            streaming_banks=len(self.layer_info.swa_attention_layer_ids),
            full_rows=full_tokens + page,
            streaming_rows=streaming_tokens + sink_rows + page,
            staging_rows=self.lt_config.stage_limit(self.model_config.context_len),
            scratch_rows=self._batch_tokens(),
            sink_base=streaming_tokens + page,
        )

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
        # Also with no full layer: the full side then hands out positions that cost no KV bytes, and
        # one mechanism (and one prefix cache) serves every set of layers.
        return SWATokenToKVPoolAllocator(
            sizes.full_max_total_num_tokens,
            sizes.swa_max_total_num_tokens,
            page_size=get_schedule().page_size,
            dtype=self.kv_cache_dtype,
            device=self.device,
            kvcache=token_to_kv_pool,
            need_sort=False,
            req_to_token_pool=req_to_token_pool,
        )


def copy_rows(pool: Any, target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy K and V rows ``source`` to ``target`` (int64 [n]) in every layer of an MHA pool."""
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer[target] = buffer[source]
