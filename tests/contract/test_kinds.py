"""Kinds of models that lazy layers refuse, told by SGLang's own ModelConfig."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang.srt.configs.model_config import ModelConfig

from lt_sglang.errors import LightTransferError
from lt_sglang.model_runner import _check_kind
from tests.engine.models import ensure_model


def test_models_of_more_than_text_are_refused(tmp_path: Path) -> None:
    """Unless their text model is served alone."""
    from transformers import Qwen2VLConfig

    text = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2VLConfig(text_config=text, architectures=["Qwen2VLForConditionalGeneration"]).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        LightTransferError, match=r"^model: Qwen2VLForConditionalGeneration takes more than text"
    ):
        _check_kind(ModelConfig(str(tmp_path)))
    _check_kind(ModelConfig(str(tmp_path), language_model_only=True))


def test_a_text_model_is_not() -> None:
    _check_kind(ModelConfig(str(ensure_model("llama"))))
