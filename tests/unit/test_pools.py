"""lt_sglang.memory.pools: SGLang's configurator with our split, and the rows behind its streaming pool."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from lt_sglang.config import DEFAULT_EXPECTED_TOKENS, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.memory import pools
from lt_sglang.memory.pools import LightTransferKVCacheConfigurator, copy_rows
from lt_sglang.memory.split import SplitInput, split_budget, split_bytes, split_tokens
from tests.property.cpu import Caches, Sizes

CONFIG = LightTransferConfig((1, 3, 4), sink_tokens=4, recent_tokens=100, expected_tokens=1000)
# Two full and three lazy layers, 2 KV heads of 8 + 8 in two bytes.
TOKEN_LAYER = 2 * (8 + 8) * 2


def configurator(
    monkeypatch: pytest.MonkeyPatch, config: LightTransferConfig = CONFIG, **schedule: Any
) -> LightTransferKVCacheConfigurator:
    Caches(Sizes())  # publishes SGLang's runtime context
    given = {"chunked_prefill_size": 64, "max_prefill_tokens": 900, "max_total_tokens": None, "page_size": 1}
    monkeypatch.setattr(pools, "get_schedule", lambda: SimpleNamespace(**{**given, **schedule}))
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
        "split": None,
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
    monkeypatch.setattr(LightTransferKVCacheConfigurator, "pool_page_size", 1)
    return made


def test_what_the_split_is_computed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch)
    with envs.SGLANG_SWA_EVICTION_INTERVAL.override(77):
        given = made.split_input()
    assert given == SplitInput(
        full_bytes=2 * TOKEN_LAYER,
        streaming_bytes=3 * TOKEN_LAYER,
        retained_tokens=100,
        sink_tokens=4,
        expected_tokens=1000,
        chunk_tokens=64,
        context_tokens=4096,
        expected_output_tokens=None,
        eviction_interval=77,
        staging_bytes=0,
    )
    with envs.SGLANG_SWA_EVICTION_INTERVAL.override(0):
        assert made.split_input().eviction_interval == 1, "SGLang slides at every token then"


@pytest.mark.parametrize(
    ("chunk", "tokens"), [(64, 64), (1, 1), (None, 4096), (-1, 4096), (0, 4096), (8192, 4096)]
)
def test_most_tokens_of_a_prefill(monkeypatch: pytest.MonkeyPatch, chunk: int | None, tokens: int) -> None:
    made = configurator(monkeypatch, chunked_prefill_size=chunk)
    assert made.split_input().chunk_tokens == tokens
    # Without chunks a batch of several prompts may be longer than the context.
    wide = configurator(monkeypatch, chunked_prefill_size=chunk, max_prefill_tokens=5000)
    assert wide._batch_tokens() == {64: 64, 1: 1, 8192: 8192}.get(chunk or 0, 5000)


def test_what_is_expected_where_nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch, replace(CONFIG, expected_tokens=None, expected_output_tokens=5))
    assert made.split_input().expected_tokens == 4096 and made.split_input().expected_output_tokens == 5
    made.model_config.context_len = 1 << 20
    assert made.split_input().expected_tokens == DEFAULT_EXPECTED_TOKENS


def test_dynamic_mode_sets_staging_rows_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, mode="dynamic", keep=2, staging_tokens=300)
    made = configurator(monkeypatch, config)
    assert made.split_input().staging_bytes == (3 * 300 + 64) * TOKEN_LAYER


def test_a_budget_becomes_pools(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made, budget = configurator(monkeypatch), 4 << 20
    with caplog.at_level(logging.INFO):
        found = made.config_from_budget(budget)
    expected = split_budget(budget, made.split_input())
    assert made.split == expected
    assert found.max_total_num_tokens == found.full_max_total_num_tokens == expected.full_tokens
    assert found.swa_max_total_num_tokens == expected.streaming_tokens
    assert (
        f"full pool {expected.full_tokens} tokens, streaming pool {expected.streaming_tokens}" in caplog.text
    )
    assert "2 full and 3 lazy layers" in caplog.text and "0.00 GiB" in caplog.text


@pytest.mark.parametrize(
    ("user", "cap", "full"), [(2000, None, 2000), (None, 1500, 1500), (2000, 1500, 1500)]
)
def test_a_limit_caps_the_full_pool(
    monkeypatch: pytest.MonkeyPatch, user: int | None, cap: int | None, full: int
) -> None:
    made = configurator(monkeypatch, max_total_tokens=user)
    found = made.config_from_budget(8 << 20, cap_tokens=cap)
    assert found.full_max_total_num_tokens == full
    assert made.split == split_tokens(full, made.split_input())


def test_a_limit_above_the_budget_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch, max_total_tokens=1 << 30)
    made.config_from_budget(4 << 20)
    assert made.split == split_budget(4 << 20, made.split_input())


def test_a_limit_says_nothing_where_all_layers_are_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch, max_total_tokens=1000)
    made.layer_info.full_attention_layer_ids = []
    with pytest.raises(LightTransferError, match=r"^--max-total-tokens: not used when every layer is lazy"):
        made.config_from_budget(4 << 20)
    configurator(monkeypatch)
    made.config_from_budget(4 << 20)


def test_a_split_above_the_budget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch)
    split = split_budget(4 << 20, made.split_input())
    need = split_bytes(split, made.split_input())
    monkeypatch.setattr(pools, "split_budget", lambda budget, given: split)
    made.config_from_budget(need)
    with pytest.raises(LightTransferError, match=f"{need} bytes needed, {need - 1} available"):
        made.config_from_budget(need - 1)


def test_sink_rows_stand_behind_the_streaming_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's allocator does not know them."""
    made = configurator(monkeypatch)
    made.config_from_budget(4 << 20)
    assert made.split is not None
    pool = made._build_hybrid_swa_kv_pool(
        full_max_total_num_tokens=500, swa_max_total_num_tokens=300, mha_pool_class=MHATokenToKVPool
    )
    assert pool.size_swa == 300 and len(pool.full_kv_pool.k_buffer) == 2
    rows = 300 + 4 * made.split.sink_sets + 1
    assert {tuple(buffer.shape) for buffer in pool.swa_kv_pool.k_buffer} == {(rows, 2, 8)}
    assert {len(buffer) for buffer in pool.full_kv_pool.v_buffer} == {501} and made.flat_pool is None
    allocator = made._build_token_to_kv_pool_allocator(
        sizes=SimpleNamespace(full_max_total_num_tokens=500, swa_max_total_num_tokens=300),
        token_to_kv_pool=pool,
        is_dsv4_model=False,
        req_to_token_pool=None,
        token_to_kv_pool_allocator=None,
    )
    assert type(allocator) is SWATokenToKVPoolAllocator and allocator.get_kvcache() is pool
    assert (allocator.size_full, allocator.size_swa, allocator.page_size) == (500, 300, 1)
    assert allocator.dtype == torch.bfloat16 and allocator.device == "cpu" and not allocator.need_sort


def test_pools_are_not_built_before_they_are_sized(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch)
    for sized, tokens in ((False, 300), (True, None)):
        if sized:
            made.config_from_budget(4 << 20)
        with pytest.raises(AssertionError):
            made._build_hybrid_swa_kv_pool(
                full_max_total_num_tokens=500,
                swa_max_total_num_tokens=tokens,
                mha_pool_class=MHATokenToKVPool,
            )


def test_dynamic_mode_builds_the_banks_of_one_flat_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    made = configurator(monkeypatch, replace(CONFIG, mode="dynamic", keep=2, staging_tokens=300))
    made.config_from_budget(4 << 20)
    assert made.split is not None
    pool = made._build_hybrid_swa_kv_pool(
        full_max_total_num_tokens=500, swa_max_total_num_tokens=300, mha_pool_class=MHATokenToKVPool
    )
    sinks = 4 * made.split.sink_sets
    assert made.flat_pool is not None and made.flat_pool.complete
    layout = made.flat_pool.layout
    assert (layout.full_banks, layout.streaming_banks, layout.full_rows) == (2, 3, 501)
    assert (layout.streaming_rows, layout.sink_base) == (301 + sinks, 301)
    assert (layout.staging_rows, layout.scratch_rows) == (300, 64)
    for bank, buffer in enumerate([*pool.full_kv_pool.k_buffer, *pool.swa_kv_pool.k_buffer]):
        buffer[1] = bank + 1
        assert (made.flat_pool.kv.k[layout.bank_start(bank) + 1] == bank + 1).all()


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
    assert adopted.lt_config is CONFIG and adopted.split is None and adopted.flat_pool is None


def test_rows_are_copied_in_every_layer_of_k_and_v() -> None:
    pool = SimpleNamespace(
        k_buffer=[torch.arange(10.0)[:, None] + 100 * layer for layer in range(2)],
        v_buffer=[torch.arange(10.0)[:, None] + 1000 + 100 * layer for layer in range(2)],
    )
    before = [buffer.clone() for buffer in (*pool.k_buffer, *pool.v_buffer)]
    copy_rows(pool, torch.tensor([7, 8]), torch.tensor([2, 1]))
    for old, new in zip(before, (*pool.k_buffer, *pool.v_buffer), strict=True):
        old[[7, 8]] = old[[2, 1]]
        assert torch.equal(old, new)
