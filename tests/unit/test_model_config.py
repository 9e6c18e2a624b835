"""A model's config.json: how it is read, and what lazy layers do not work with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.launch.model_config import read_model_config, unsupported_features
from lt_sglang.launch.options import layer_count


def test_read_model_config(tmp_path: Path) -> None:
    with pytest.raises(LightTransferError, match=r"has no config\.json"):
        read_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(LightTransferError, match="must be a JSON object"):
        read_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    assert read_model_config(str(tmp_path)) == {"num_hidden_layers": 3}


def test_layer_count() -> None:
    assert layer_count({"num_hidden_layers": 3}) == 3
    assert layer_count({"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 5}}) == 5
    assert layer_count({}) is None


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "llama"}, []),
        ({"model_type": "mistral", "sliding_window": 4096}, []),
        ({"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False}, []),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, []),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, []),
        # A config.json made from Qwen2.5's, under a name of its own.
        ({"model_type": "qwen2littrans", "sliding_window": 131072, "use_sliding_window": False}, []),
        ({"model_type": "qwen2littrans", "sliding_window": 4096, "use_sliding_window": True}, ["window"]),
        ({"model_type": "qwen2littrans", "sliding_window": 4096}, ["window"]),
        # Kinds of layers count, whatever else is said.
        (
            {"model_type": "gemma3", "layer_types": ["sliding_attention"], "use_sliding_window": False},
            ["window"],
        ),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"]}, ["linear-attention"]),
        (
            {"model_type": "gemma2", "sliding_window": 4096, "attn_logit_softcapping": 50.0},
            ["window", "soft-capping"],
        ),
        ({"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"]}, ["window"]),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, ["linear"]),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, ["MLA"]),
        ({"model_type": "t5", "is_encoder_decoder": True}, ["encoder"]),
        ({"text_config": {"model_type": "gemma3_text", "sliding_window": 512}}, ["window"]),
    ],
)
def test_unsupported_features(config: dict[str, Any], found: list[str]) -> None:
    names = unsupported_features(config)
    assert len(names) == len(found)
    assert all(part in name for part, name in zip(found, names, strict=True))
