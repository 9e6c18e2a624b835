"""lt_sglang.planner.shapes: weights counted and published, quantization, what a config.json lacks."""

from __future__ import annotations

from typing import Any

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.planner.shapes import SHAPES, _config, shape_from_config

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


QWEN_25_32B = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}


QWEN_25_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@pytest.mark.parametrize(
    ("config", "params", "active"),
    [
        (LLAMA_3_8B, 8_030_261_248, None),
        (QWEN_25_32B, 32_763_876_352, None),
        (QWEN_25_05B, 494_032_768, None),
        (MIXTRAL, 46_702_792_704, 12_879_925_248),
        (QWEN3_30B, 30_532_122_624, 3_352_860_672),
    ],
    ids=["Llama-3-8B", "Qwen2.5-32B", "Qwen2.5-0.5B", "Mixtral-8x7B", "Qwen3-30B-A3B"],
)
def test_weights_are_counted_as_published(config: dict[str, Any], params: int, active: int | None) -> None:
    shape = shape_from_config(config, "model")
    assert shape.params == pytest.approx(params, rel=1e-6)
    assert shape.multiplied_params == pytest.approx(active or params, rel=1e-3)


def test_known_shapes_agree_with_counting() -> None:
    assert SHAPES["qwen2.5-32b"].params == pytest.approx(
        shape_from_config(QWEN_25_32B, "m").params, rel=0.005
    )


PUBLISHED = {  # billions of weights, as their publishers count them
    "llama-3-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "llama-3.1-8b": 8.03,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "llama-3.3-70b": 70.55,
    "mistral-7b": 7.242,
    "mistral-nemo-12b": 12.25,
    "mistral-small-24b": 23.57,
    "mixtral-8x22b": 140.6,
    "mixtral-8x7b": 46.7,
    "qwen1.5-moe-a2.7b": 14.32,
    "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76,
    "qwen2.5-72b": 72.71,
    "qwen2.5-7b": 7.616,
    "qwen3-14b": 14.77,
    "qwen3-235b-a22b": 235.1,
    "qwen3-30b-a3b": 30.53,
    "qwen3-32b": 32.76,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.191,
    "qwq-32b": 32.76,
}


def test_known_shapes_have_the_published_number_of_weights() -> None:
    counted = {name: shape.params / 1e9 for name, shape in SHAPES.items()}
    assert counted == pytest.approx(PUBLISHED, rel=1e-3)


def test_a_shared_expert_is_weights_that_every_token_uses() -> None:
    """In each layer three matrices of its own width and a gate, in bytes of bfloat16."""
    shape, published = SHAPES["qwen1.5-moe-a2.7b"], _config("qwen1.5-moe-a2.7b")
    without = shape_from_config({**published, "shared_expert_intermediate_size": 0}, "m")
    shared = 24 * (3 * 2048 * 5632 + 2048)
    assert shape.total_weight_bytes - without.total_weight_bytes == 2 * shared
    assert shape.active_params is not None and without.active_params is not None
    assert shape.active_params - without.active_params == shared
    assert shape.active_params == pytest.approx(2.7e9, rel=0.02)


def test_nested_text_config() -> None:
    shape = shape_from_config({"model_type": "wrapper", "text_config": QWEN_25_05B}, "m")
    assert shape.layers == 24


@pytest.mark.parametrize(
    ("quantization", "weight_bytes"),
    [
        ({"quant_method": "fp8"}, 1.0),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, (4 + 20 / 128) / 8),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1.0),
    ],
)
def test_quantized_weights(quantization: dict[str, Any], weight_bytes: float) -> None:
    shape = shape_from_config({**LLAMA_3_8B, "quantization_config": quantization}, "m")
    assert shape.weight_bytes == weight_bytes
    assert shape.half_params > 2 * LLAMA_3_8B["vocab_size"] * LLAMA_3_8B["hidden_size"]


def test_awq_weights_are_those_of_the_published_checkpoint() -> None:
    """Qwen2.5-72B-Instruct-AWQ takes about 39 GiB: embeddings and head stay in half precision."""
    shape = shape_from_config(
        {
            "model_type": "qwen2",
            "hidden_size": 8192,
            "intermediate_size": 29696,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
            "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128},
        },
        "m",
    )
    assert shape.total_weight_bytes / 2**30 == pytest.approx(39, rel=0.02)


def test_unknown_quantization_asks_for_the_size() -> None:
    with pytest.raises(LightTransferError, match="--weights-gib"):
        shape_from_config({**LLAMA_3_8B, "quantization_config": {"quant_method": "new"}}, "m")


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"]
)
def test_a_missing_key_is_named(key: str) -> None:
    config = {name: value for name, value in LLAMA_3_8B.items() if name != key}
    with pytest.raises(LightTransferError, match=key):
        shape_from_config(config, "m")
