"""lt_sglang.memory.pools: SGLang's configurator with memory that full and lazy layers share."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.memory import pools
from lt_sglang.memory.allocator import ElasticAllocator
from lt_sglang.memory.demand import Demand
from lt_sglang.memory.pools import LightTransferKVCacheConfigurator
from lt_sglang.memory.sizes import Sizes, size_memory
from lt_sglang.memory.units import UnitShape
from tests.property.cpu import Caches
from tests.property.cpu import Sizes as CacheSizes

CONFIG = LightTransferConfig((1, 3, 4), sink_tokens=4, recent_tokens=100)
SHAPE = UnitShape(2, 3)
# Two full and three lazy layers, 2 KV heads of 8 + 8 in two bytes.
TOKEN_LAYER = 2 * (8 + 8) * 2


def configurator(
    monkeypatch: pytest.MonkeyPatch, config: LightTransferConfig = CONFIG, **schedule: Any
) -> LightTransferKVCacheConfigurator:
    Caches(CacheSizes())  # publishes SGLang's runtime context
    given: dict[str, Any] = {
        "chunked_prefill_size": 64,
        "max_prefill_tokens": 900,
        "max_total_tokens": None,
        "page_size": 1,
    }
    given.update(schedule)
    monkeypatch.setattr(pools, "get_schedule", lambda: SimpleNamespace(**given))
    made = object.__new__(LightTransferKVCacheConfigurator)
    model = SimpleNamespace(
        get_num_kv_heads=lambda tp, *_: 2 // tp,
        head_dim=8,
        v_head_dim=8,
        context_len=4096,
        hf_text_config=None,
    )
    layers = SimpleNamespace(full_attention_layer_ids=[0, 2], swa_attention_layer_ids=[1, 3, 4])
    fields: dict[str, Any] = {
        "lt_config": config,
        "sizes": None,
        "flat_pool": None,
        "model_config": model,
        "layer_info": layers,
        "kv_cache_dtype": torch.bfloat16,
        "kv_cache_dtype_str": "auto",
        "device": "cpu",
        "page_size": 1,
        "is_hybrid_swa_compress": False,
        "draft_swa_full_capacity": False,
        "post_capture_kv_active": False,
    }
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    monkeypatch.setattr(LightTransferKVCacheConfigurator, "pool_page_size", given["page_size"])
    return made


def expected(budget: int, config: LightTransferConfig = CONFIG, **changes: Any) -> Sizes:
    given = {
        "token_layer_bytes": TOKEN_LAYER,
        "page_size": 1,
        "chunk_tokens": 64,
        "context_tokens": 4096,
        "interval": 128,
        "full_limit": None,
    }
    return size_memory(budget, SHAPE, config, **{**given, **changes})


def test_what_the_sizes_are_computed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch, page_size=16)
    assert made.unit_shape == SHAPE and made.token_layer_bytes == TOKEN_LAYER
    with envs.SGLANG_SWA_EVICTION_INTERVAL.override(77):
        made.config_from_budget(4 << 20)
    assert made.sizes is not None and made.sizes == expected(4 << 20, page_size=16, interval=77)
    assert made.sizes.demand == Demand(SHAPE, 16, 100, 77, 64, 4096, 0, 4)
    with envs.SGLANG_SWA_EVICTION_INTERVAL.override(0):
        made.config_from_budget(4 << 20)
    assert made.sizes.demand.interval == 1, "SGLang slides at every token then"


@pytest.mark.parametrize(
    ("chunk", "tokens"), [(64, 64), (1, 1), (None, 4096), (-1, 4096), (0, 4096), (8192, 4096)]
)
def test_most_tokens_of_a_prefill(monkeypatch: pytest.MonkeyPatch, chunk: int | None, tokens: int) -> None:
    made = configurator(monkeypatch, chunked_prefill_size=chunk)
    made.config_from_budget(16 << 20)
    assert made.sizes is not None and made.sizes.demand.chunk == tokens
    # Without chunks a batch of several prompts may be longer than the context.
    wide = configurator(monkeypatch, chunked_prefill_size=chunk, max_prefill_tokens=5000)
    assert wide._batch_tokens() == {64: 64, 1: 1, 8192: 8192}.get(chunk or 0, 5000)


def test_a_budget_becomes_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made, budget = configurator(monkeypatch), 4 << 20
    with caplog.at_level(logging.INFO):
        found = made.config_from_budget(budget)
    sizes = expected(budget)
    assert made.sizes == sizes
    assert found.max_total_num_tokens == found.full_max_total_num_tokens == sizes.longest
    assert found.swa_max_total_num_tokens == sizes.streaming_slots
    assert f"LightTransfer KV memory: {sizes.units} units of 1 x 1 rows, 0.00 GiB per rank" in caplog.text
    assert "2 full and" in caplog.text and "3 lazy layers" in caplog.text


def test_kv_bytes_cap_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch, replace(CONFIG, kv_bytes=3 << 20))
    made.config_from_budget(4 << 20)
    assert made.sizes == expected(3 << 20)
    made.config_from_budget(2 << 20)
    assert made.sizes == expected(2 << 20)


@pytest.mark.parametrize(
    ("user", "cap", "full"), [(2000, None, 2000), (None, 1500, 1500), (2000, 1500, 1500)]
)
def test_a_limit_caps_the_tokens_of_full_layers(
    monkeypatch: pytest.MonkeyPatch, user: int | None, cap: int | None, full: int
) -> None:
    made = configurator(monkeypatch, max_total_tokens=user)
    found = made.config_from_budget(8 << 20, cap_tokens=cap)
    assert found.full_max_total_num_tokens == full
    assert made.sizes == expected(8 << 20, full_limit=full)


def test_a_limit_above_the_budget_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch, max_total_tokens=1 << 30)
    made.config_from_budget(4 << 20)
    assert made.sizes is not None and made.sizes.units == expected(4 << 20).units


def test_a_limit_says_nothing_where_all_layers_are_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch, max_total_tokens=1000)
    made.layer_info.full_attention_layer_ids = []
    with pytest.raises(LightTransferError, match=r"^--max-total-tokens: not used when every layer is lazy"):
        made.config_from_budget(4 << 20)
    configurator(monkeypatch)
    made.config_from_budget(4 << 20)


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LightTransferError, match="do not hold a prefill chunk of 64 tokens and a window"):
        configurator(monkeypatch).config_from_budget(1 << 15)


def built(made: LightTransferKVCacheConfigurator) -> Any:
    return made._build_hybrid_swa_kv_pool(
        full_max_total_num_tokens=500, swa_max_total_num_tokens=300, mha_pool_class=MHATokenToKVPool
    )


def allocator_of(made: LightTransferKVCacheConfigurator, pool: Any) -> Any:
    return made._build_token_to_kv_pool_allocator(
        sizes=SimpleNamespace(full_max_total_num_tokens=500, swa_max_total_num_tokens=300),
        token_to_kv_pool=pool,
        is_dsv4_model=False,
        req_to_token_pool=None,
        token_to_kv_pool_allocator=None,
    )


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, mode="dynamic", keep=2)], ids=["static", "dynamic"]
)
def test_both_pools_are_the_lanes_of_one_memory(
    monkeypatch: pytest.MonkeyPatch, config: LightTransferConfig, page: int
) -> None:
    made = configurator(monkeypatch, config, page_size=page)
    made.config_from_budget(4 << 20)
    assert made.sizes is not None
    pool = built(made)
    assert made.flat_pool is not None and made.flat_pool.complete
    layout, rows = made.flat_pool.layout, (made.sizes.units + 1) * page
    assert (layout.full_banks, layout.streaming_banks, layout.rows) == (2, 3, rows)
    buffers = [*pool.full_kv_pool.k_buffer, *pool.swa_kv_pool.k_buffer]
    assert {tuple(buffer.shape) for buffer in buffers} == {(rows, 2, 8)}
    for bank, buffer in enumerate(buffers):
        buffer[1] = bank + 1
        assert (made.flat_pool.kv.k[layout.bank_start(bank) + 1] == bank + 1).all()
    # What SGLang says of sizes in logs and metrics is what requests can have.
    assert (pool.size, pool.size_swa) == (made.sizes.longest, made.sizes.streaming_slots)
    allocator = allocator_of(made, pool)
    assert type(allocator) is ElasticAllocator and allocator.get_kvcache() is pool
    assert allocator.units is made.flat_pool.units and len(allocator.units) == made.sizes.units
    assert (allocator.shape, allocator.demand) == (SHAPE, made.sizes.demand)
    assert allocator.page_size == page and allocator.dtype == torch.bfloat16 and not allocator.need_sort
    assert not allocator.full_is_limited


def test_the_limit_reaches_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch, max_total_tokens=2000)
    made.config_from_budget(8 << 20)
    allocator = allocator_of(made, built(made))
    assert allocator.full_is_limited and allocator.size_full == 2000


def test_the_tensors_hold_what_was_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch)
    made.config_from_budget(4 << 20)
    built(made)
    assert made.sizes is not None and made.flat_pool is not None
    assert sum(part.nbytes for part in made.flat_pool.kv) == (made.sizes.units + 1) * made.sizes.unit_bytes


def test_pools_are_not_built_before_they_are_sized(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch)
    with pytest.raises(AssertionError):
        built(made)
    with pytest.raises(AssertionError):
        allocator_of(made, None)


@pytest.mark.parametrize("what", ["draft", "hisparse"])
def test_what_brings_another_allocator_is_refused(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    made = configurator(monkeypatch)
    if what == "hisparse":
        monkeypatch.setattr(pools, "get_memory", lambda: SimpleNamespace(enable_hisparse=True))
    with pytest.raises(LightTransferError, match="draft workers and HiSparse are not supported"):
        made._build_token_to_kv_pool_allocator(
            sizes=None,
            token_to_kv_pool=None,
            is_dsv4_model=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=object() if what == "draft" else None,
        )


def test_a_stock_configurator_is_taken_over_whole() -> None:
    stock = object.__new__(KVCacheConfigurator)
    values = {
        name: object() for name, field in KVCacheConfigurator.__dataclass_fields__.items() if field.init
    }
    for name, value in values.items():
        object.__setattr__(stock, name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCacheConfigurator, "__post_init__", lambda self: None, raising=False)
        adopted = LightTransferKVCacheConfigurator.adopt(stock, CONFIG)
    assert type(adopted) is LightTransferKVCacheConfigurator
    assert {name: getattr(adopted, name) for name in values} == values
    assert adopted.lt_config is CONFIG and adopted.sizes is None and adopted.flat_pool is None
