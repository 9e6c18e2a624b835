"""lt_sglang.refusals: one case per refused flag."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.names import BACKEND
from lt_sglang.refusals import (
    DYNAMIC_REFUSALS,
    REFUSALS,
    VARIABLES,
    Refusal,
    check_dynamic_args,
    check_server_args,
)

# A value for each field that a user could give and that must be refused.
BAD: dict[str, Any] = {
    "speculative_algorithm": "EAGLE",
    "disaggregation_mode": "prefill",
    "pp_size": 2,
    "dcp_size": 2,
    "attn_cp_size": 2,
    "attn_dp_size": 2,
    "kv_cache_dtype": "fp4_e2m1",
    "kv_canary": "log",
    "model_impl": "transformers",
    "hicache_storage_backend": "file",
    "hicache_io_backend": "direct",
    "hicache_mem_layout": "page_head",
    "radix_cache_backend": "cpp",
    "dllm_algorithm": "LowConfidence",
    "lora_paths": ["adapter"],
    "swa_full_tokens_ratio": 0.5,
    "swa_prefix_tails": 0,
    "rl_on_policy_target": "fsdp",
    "tokenizer_worker_num": 2,
}


def good_args(**changes: Any) -> SimpleNamespace:
    """Server arguments as SGLang leaves them when nothing is asked for."""
    values: dict[str, Any] = {refusal.field: False for refusal in REFUSALS}
    values |= {
        "attention_backend": BACKEND,
        "prefill_attention_backend": None,
        "decode_attention_backend": None,
        "speculative_algorithm": None,
        "disaggregation_mode": "null",
        "pp_size": 1,
        "dcp_size": 1,
        "attn_cp_size": 1,
        "attn_dp_size": 1,
        "kv_canary": "none",
        "model_impl": "auto",
        "kv_cache_dtype": "auto",
        "hicache_io_backend": "kernel",
        "hicache_mem_layout": "page_first",
        "radix_cache_backend": None,
        "dllm_algorithm": None,
        "swa_full_tokens_ratio": None,
        "swa_prefix_tails": None,
        "rl_on_policy_target": None,
        "tokenizer_worker_num": 1,
    }
    return SimpleNamespace(**{**values, **changes})


def test_defaults_pass() -> None:
    check_server_args(good_args())


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    check_server_args(good_args())
    monkeypatch.setenv(name, "1")
    with pytest.raises(LightTransferError, match=f"^{name}=1: not supported with lazy layers: "):
        check_server_args(good_args())


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.field)
def test_each_is_refused_by_name(refusal: Refusal) -> None:
    value = BAD.get(refusal.field, True)
    with pytest.raises(LightTransferError) as caught:
        check_server_args(good_args(**{refusal.field: value}))
    message = str(caught.value)
    assert message.startswith(refusal.flag)
    assert refusal.why in message
    assert "\n" not in message
    # A switch has no value worth repeating.
    assert (f"{refusal.flag} {value}" in message) == (value is not True)


@pytest.mark.parametrize("refusal", DYNAMIC_REFUSALS, ids=lambda refusal: refusal.field)
def test_dynamic_mode_refuses_more(refusal: Refusal) -> None:
    fine = {other.field: None for other in DYNAMIC_REFUSALS}
    check_dynamic_args(good_args(**fine))
    args = good_args(**{**fine, refusal.field: BAD.get(refusal.field, True)})
    check_server_args(args)
    with pytest.raises(LightTransferError) as caught:
        check_dynamic_args(args)
    assert str(caught.value).startswith(refusal.flag)
    assert "not supported in dynamic mode" in str(caught.value)


def test_flags_and_fields_are_unique_and_match() -> None:
    assert len({refusal.field for refusal in REFUSALS}) == len(REFUSALS)
    for refusal in REFUSALS:
        assert refusal.flag == "--" + refusal.field.replace("_", "-")


@pytest.mark.parametrize("dtype", ["auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2", None])
def test_supported_kv_dtypes(dtype: str | None) -> None:
    check_server_args(good_args(kv_cache_dtype=dtype))


@pytest.mark.parametrize(
    "role", ["attention_backend", "prefill_attention_backend", "decode_attention_backend"]
)
def test_backends_must_be_ours_in_both_phases(role: str) -> None:
    check_server_args(good_args(**{role: BACKEND}))
    with pytest.raises(LightTransferError, match=rf"--{role.replace('_', '-')} fa3"):
        check_server_args(good_args(**{role: "fa3"}))


def test_the_first_problem_is_named_alone() -> None:
    with pytest.raises(LightTransferError) as caught:
        check_server_args(good_args(speculative_algorithm="EAGLE", pp_size=2))
    assert "--speculative-algorithm EAGLE" in str(caught.value)
    assert "--pp-size" not in str(caught.value)


@pytest.mark.parametrize("given", ["prefill", "decode"])
def test_one_phase_alone_is_refused(given: str) -> None:
    """SGLang would choose a stock backend for the other, which reads lazy layers as if all was there."""
    args = good_args(attention_backend=None, **{f"{given}_attention_backend": BACKEND})
    with pytest.raises(LightTransferError, match=f"^--{given}-attention-backend {BACKEND}: .*both"):
        check_server_args(args)
    both = {f"{role}_attention_backend": BACKEND for role in ("prefill", "decode")}
    check_server_args(good_args(attention_backend=None, **both))


def test_windows_must_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "SGLANG_OPT_UNIFIED_CACHE_FREE_OUT_OF_WINDOW_SLOTS"
    monkeypatch.setenv(variable, "1")
    check_server_args(good_args())
    monkeypatch.setenv(variable, "0")
    refused = f"^{variable}=0: not supported with lazy layers: streaming slots would be kept"
    with pytest.raises(LightTransferError, match=refused):
        check_server_args(good_args())
