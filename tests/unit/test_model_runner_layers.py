"""lt_sglang.model_runner: the attention layers of a loaded model, and which of them may be lazy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.model_runner import ModelRunner

from lt_sglang import model_runner as module
from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.identify.state import STORED_SETS
from lt_sglang.model_runner import _check_layers
from tests.unit.test_model_runner import CONFIG, runner


def layer(number: int, **changes: Any) -> Any:
    made = object.__new__(RadixAttention)
    torch.nn.Module.__init__(made)
    fields = {
        "layer_id": number,
        "sliding_window_size": -1,
        "is_cross_attention": False,
        "logit_cap": 0.0,
        "attn_type": AttentionType.DECODER,
        "qk_head_dim": 8,
        "v_head_dim": 8,
    }
    for name, value in {**fields, **changes}.items():
        object.__setattr__(made, name, value)
    return made


def loaded(monkeypatch: pytest.MonkeyPatch, config: LightTransferConfig = CONFIG, **facts: Any) -> Any:
    made = runner(monkeypatch)
    made.lt_config = config
    made.model_config = SimpleNamespace(is_multimodal=False)
    made.model = torch.nn.ModuleList([layer(number) for number in range(4)])
    made.is_hybrid_swa = facts.get("hybrid", True)
    made.sliding_window_size = facts.get("window", config.retained_tokens - 1)
    monkeypatch.setattr(ModelRunner, "load_model", lambda self: self.events.append("load"))
    made.load_model()
    return made


def test_lazy_layers_get_their_window(monkeypatch: pytest.MonkeyPatch) -> None:
    made = loaded(monkeypatch)
    assert [one.sliding_window_size for one in made.model] == [-1, 5, -1, 5] and made.events == ["load"]
    wide = LightTransferConfig((1, 3), sink_tokens=9, recent_tokens=6)
    assert wide.retained_tokens == 9
    assert [one.sliding_window_size for one in loaded(monkeypatch, wide).model] == [-1, 5, -1, 5]


def test_in_dynamic_mode_and_without_lazy_layers_no_layer_has_a_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dynamic = LightTransferConfig((1, 3), mode="dynamic", keep=2, sink_tokens=2, recent_tokens=6)
    for made in (
        loaded(monkeypatch, dynamic),
        loaded(monkeypatch, LightTransferConfig(()), hybrid=False, window=None),
    ):
        assert {one.sliding_window_size for one in made.model} == {-1}


@pytest.mark.parametrize("facts", [{"hybrid": False}, {"window": None}, {"window": 6}])
def test_a_model_that_is_not_taken_as_hybrid_is_refused(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any]
) -> None:
    with pytest.raises(LightTransferError, match="SGLang did not take the sliding window"):
        loaded(monkeypatch, **facts)


def test_a_list_beyond_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LightTransferError):
        loaded(monkeypatch, LightTransferConfig((1, 4), sink_tokens=2, recent_tokens=6))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sliding_window_size": 8}, "a sliding window of its own"),
        ({"is_cross_attention": True}, "cross-attention"),
        ({"logit_cap": 30.0}, "logit soft-capping"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "non-causal attention"),
        ({"v_head_dim": 4}, "different K and V head sizes"),
    ],
)
def test_layers_that_cannot_be_lazy_are_refused(changes: dict[str, Any], what: str) -> None:
    _check_layers({0: layer(0), 1: layer(1, sliding_window_size=None)})
    with pytest.raises(LightTransferError, match=f"model: layer 1 has {what}, which lazy layers do not"):
        _check_layers({0: layer(0), 1: layer(1, **changes)})


def test_layers_must_be_numbered_in_order() -> None:
    with pytest.raises(LightTransferError, match="not numbered 0 to n - 1"):
        _check_layers({1: layer(1), 2: layer(2)})


def dynamic(monkeypatch: pytest.MonkeyPatch, score: str = "residual-error", **facts: Any) -> Any:
    """A runner whose pools are there, with what it hands to the parts of dynamic mode in ``handed``."""
    made = runner(monkeypatch)
    made.lt_config = LightTransferConfig((1, 3), mode="dynamic", keep=2, score=score)
    made.model = torch.nn.ModuleList([layer(number) for number in range(4)])
    for number, one in enumerate(made.model):
        one.tp_q_head_num, one.tp_k_head_num = facts.get("heads", [6, 6, 6, 6])[number], 2
    made.kv_cache_configurator = SimpleNamespace(
        flat_pool=SimpleNamespace(complete=True), sizes=SimpleNamespace(demand=SimpleNamespace(undecided=77))
    )
    made.kv_cache_dtype = torch.bfloat16
    text = SimpleNamespace(**facts.get("text", {}))
    made.model_config = SimpleNamespace(
        is_generation=facts.get("generates", True),
        hf_text_config=text,
        num_attention_heads=12,
        context_len=99,
    )
    projections = dict.fromkeys(range(facts.get("projections", 4)), "o_proj")
    monkeypatch.setattr(module, "projections_of", lambda model: projections)
    handed: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def take(*given: Any, **named: Any) -> str:
            handed[name] = (given, named)
            return name

        return take

    for name in ("LayerSetStore", "DynamicState", "PrefillTracker", "tp_ranks"):
        monkeypatch.setattr(module, name, keep(name))
    made._init_dynamic()
    assert (made.dynamic, made.prefills) == ("DynamicState", "PrefillTracker")
    return made, handed


def test_the_parts_of_dynamic_mode_get_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    made, handed = dynamic(monkeypatch)
    rows = made.caches.rows.req_to_token.shape[0]
    assert handed["LayerSetStore"] == ((rows + STORED_SETS, (1, 3), 4, rows, "cpu"), {})
    assert handed["tp_ranks"] == ((6, 12), {})
    assert handed["PrefillTracker"] == ((made.lt_config, "LayerSetStore", 77), {})
    (config, pool, dtype, sets, score, ranks, projections), named = handed["DynamicState"]
    assert (config, pool) == (made.lt_config, made.kv_cache_configurator.flat_pool) and not named
    assert (dtype, sets, ranks) == (torch.bfloat16, "LayerSetStore", "tp_ranks")
    assert score.name == "residual-error" and set(projections) == {0, 1, 2, 3}
    _, handed = dynamic(monkeypatch, text={"original_num_attention_heads": 9})
    assert handed["tp_ranks"] == ((6, 9), {}), "SGLang pads them on a CPU"
    _, handed = dynamic(monkeypatch, score="list")
    assert handed["DynamicState"][0][4] is None


def test_only_scores_that_read_the_residual_stream_need_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic(monkeypatch, score="lighttransfer", projections=3)
    dynamic(monkeypatch, score="list", projections=0)
    with pytest.raises(LightTransferError, match="score: residual-error needs an o_proj beside every"):
        dynamic(monkeypatch, projections=3)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"generates": False}, "mode: dynamic needs a model that generates"),
        (
            {"heads": [6, 6, 5, 6]},
            r"different shapes \[\(5, 2, 8\), \(6, 2, 8\)\] cannot change",
        ),
    ],
)
def test_what_dynamic_mode_cannot_serve_is_refused(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], message: str
) -> None:
    with pytest.raises(LightTransferError, match=message):
        dynamic(monkeypatch, **facts)
