"""lt_sglang.resolve: where the configuration comes from, and what SGLang is told."""

from __future__ import annotations

import json
import os
import random
from types import SimpleNamespace
from typing import Any

import pytest

from lt_sglang.config import CONFIG_KEY, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.names import ACTIVE_VARIABLE, BACKEND, is_requested
from lt_sglang.resolve import _check_architecture, apply_config, load_config, model_overrides

KNOWN = "cxdu/QwQ-32B-LightTransfer"


def layers(text: str) -> dict[str, Any]:
    return {CONFIG_KEY: {"lazy_layers": text}}


def test_precedence() -> None:
    first = load_config(layers("1"), layers("2"), KNOWN)
    assert (first.lazy_layers, first.source) == ((1,), "model override args")
    second = load_config({}, layers("2"), KNOWN)
    assert (second.lazy_layers, second.source) == ((2,), "the model's config.json")
    third = load_config({"other": 1}, {"model_type": "qwen2"}, KNOWN)
    assert len(third.lazy_layers) == 32
    assert "known model" in third.source


def test_a_named_source_is_kept() -> None:
    given = LightTransferConfig(lazy_layers=(1,), source="--lt-lazy-layers").to_dict()
    assert load_config({CONFIG_KEY: given}, {}, "x").source == "--lt-lazy-layers"


def test_nothing_known_is_an_error_that_names_the_model() -> None:
    with pytest.raises(
        LightTransferError, match=r"lazy layers: none are known for some/model.*\"dynamic\".*calibrate"
    ):
        load_config({}, {}, "some/model")


@pytest.mark.parametrize("bad", [None, "5-24", [], {}, {"lazy_layers": "x"}])
def test_a_bad_override_is_not_skipped(bad: Any) -> None:
    with pytest.raises((LightTransferError, TypeError)):
        load_config({CONFIG_KEY: bad}, layers("2"), KNOWN)


def test_overrides_describe_a_hybrid_model() -> None:
    rng = random.Random(0)
    for _ in range(100):
        count = rng.randrange(1, 81)
        lazy = tuple(sorted(rng.sample(range(count), rng.randrange(1, count + 1))))
        config = LightTransferConfig(
            lazy, sink_tokens=rng.randrange(0, 200), recent_tokens=rng.randrange(1, 2000)
        )
        made = model_overrides(config, count)
        assert made["is_hybrid_swa"] is True
        assert [layer for layer, one in enumerate(made["hybrid_layer_pattern"]) if one] == list(lazy)
        assert len(made["hybrid_layer_pattern"]) == count
        # window_left = tokens kept besides the query's own.
        assert made["sliding_window_size"] == config.retained_tokens - 1
        assert LightTransferConfig.from_dict(json.loads(json.dumps(made))[CONFIG_KEY]) == config


def test_no_lazy_layer_leaves_the_model_alone() -> None:
    assert set(model_overrides(LightTransferConfig(()), 32)) == {CONFIG_KEY}


@pytest.mark.parametrize(
    ("path", "served_as"),
    [
        (KNOWN, "serve it as Qwen2ForCausalLM, whose weights it has"),
        ("some/model", "serve it as Qwen2ForCausalLM, or as that of SGLang's models whose weights it has"),
    ],
)
def test_code_of_a_models_own_is_refused_with_what_serves_it(path: str, served_as: str) -> None:
    with pytest.raises(LightTransferError, match=rf"^{path}: its architecture Mine is code") as refused:
        _check_architecture(("Mine",), path)
    override = json.dumps({"architectures": ["Qwen2ForCausalLM"]})
    assert str(refused.value).endswith(f"{served_as}: --json-model-override-args '{override}'")
    _check_architecture(("Qwen2ForCausalLM",), path)
    with pytest.raises(LightTransferError, match=r"its config\.json names no architecture"):
        _check_architecture((), path)


@pytest.mark.parametrize(
    "field", ["attention_backend", "prefill_attention_backend", "decode_attention_backend"]
)
def test_requested_by_any_backend_flag(field: str) -> None:
    args = SimpleNamespace(
        attention_backend=None, prefill_attention_backend=None, decode_attention_backend="fa3"
    )
    assert not is_requested(args)
    setattr(args, field, BACKEND)
    assert is_requested(args)


def test_a_stock_engine_after_ours_starts_stock_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine of ours left in the environment would put our hooks into its schedulers."""
    monkeypatch.setattr("sglang.srt.arg_groups.overrides.resolving_view", lambda args: args)
    monkeypatch.setenv(ACTIVE_VARIABLE, "1")
    stock = SimpleNamespace(
        attention_backend="fa3", prefill_attention_backend=None, decode_attention_backend=None
    )
    resolved: list[Any] = []
    apply_config(stock, resolved.append)
    assert resolved == [stock] and ACTIVE_VARIABLE not in os.environ
