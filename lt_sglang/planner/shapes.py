"""Model shapes and GPUs: the numbers a plan starts from.

shapes.json has the known shapes: what of config.json tells a shape, and the context it is served with under
dummy weights, where that is longer than the model's. ``like``: another shape whose configuration is changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lt_sglang.errors import LightTransferError

GIB = 2**30


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer.

    params: all weights. active_params: those one token multiplies with (fewer in a mixture of experts).
    weight_bytes: bytes of one weight. half_params: weights of a quantized model that are not quantized
    (embeddings, head), 2 bytes each. max_tokens: context length, or None if not known.
    """

    name: str
    params: float
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    active_params: float | None = None
    weight_bytes: float = 2.0
    max_tokens: int | None = None
    half_params: float = 0.0

    @property
    def total_weight_bytes(self) -> float:
        """Bytes of all weights together."""
        return (self.params - self.half_params) * self.weight_bytes + self.half_params * 2

    @property
    def multiplied_params(self) -> float:
        """Weights one token is multiplied with."""
        return self.active_params if self.active_params is not None else self.params

    def kv_token_layer(self, kv_bytes: int, tp: int = 1) -> int:
        """KV bytes of one token in one layer on one of ``tp`` ranks; beyond the KV heads, copies."""
        return 2 * max(1, self.kv_heads // tp) * self.head_dim * kv_bytes


@dataclass(frozen=True)
class Gpu:
    """memory: bytes torch sees. bandwidth: bytes/s. flops: dense bf16 per second."""

    name: str
    memory: float
    bandwidth: float
    flops: float


GPUS = {
    "a100-80": Gpu("A100 80 GB", 79.2 * GIB, 2.039e12, 312e12),
    "h100-80": Gpu("H100 80 GB", 79.2 * GIB, 3.35e12, 989e12),
    "h200-141": Gpu("H200 141 GB", 139.8 * GIB, 4.8e12, 989e12),
}


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape a config.json describes, its weights counted from the architecture.

    Counts Llama, Mistral, Qwen2, Qwen3 and their mixtures of experts (biases and norms are left out of
    mixtures' experts: below 0.1 %). Raises LightTransferError if a needed key is missing.
    """
    nested = config.get("text_config")
    text: Mapping[str, Any] = {**config, **nested} if isinstance(nested, Mapping) else config
    hidden, layers, heads = (_need(text, key, name) for key in _NEEDED)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    embeddings = int(_need(text, "vocab_size", name)) * hidden
    if not text.get("tie_word_embeddings", False):
        embeddings *= 2
    attention = _attention_params(text, hidden, heads * head_dim, kv_heads * head_dim, head_dim)
    all_mlp, active_mlp = _mlp_params(text, hidden, layers, name)
    shared = embeddings + layers * (attention + 2 * hidden) + hidden
    weight_bytes = _weight_bytes(config, text)
    return ModelShape(
        name=name,
        params=float(shared + all_mlp),
        layers=layers,
        q_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        active_params=float(shared + active_mlp) if active_mlp != all_mlp else None,
        weight_bytes=weight_bytes,
        max_tokens=text.get("max_position_embeddings"),
        half_params=float(embeddings + (2 * layers + 1) * hidden) if weight_bytes != 2.0 else 0.0,
    )


_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_BIASED = ("qwen2", "qwen2_moe")


def _need(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise LightTransferError(
            f"config.json of {name}: {key} is {value!r}, not an integer from 1; use --shape"
        )
    return value


def _attention_params(
    text: Mapping[str, Any], hidden: int, q_width: int, kv_width: int, head_dim: int
) -> int:
    count = hidden * (2 * q_width + 2 * kv_width)
    if text.get("model_type") in _BIASED or text.get("attention_bias"):
        count += q_width + 2 * kv_width
    if str(text.get("model_type")).startswith("qwen3"):
        count += 2 * head_dim
    return count


def _mlp_params(text: Mapping[str, Any], hidden: int, layers: int, name: str) -> tuple[int, int]:
    """Weights of all MLPs of the model, and those one token uses."""
    dense = 3 * hidden * int(text.get("intermediate_size") or 0)
    experts = int(text.get("num_local_experts") or text.get("num_experts") or 0)
    if not experts:
        if not dense:
            raise LightTransferError(f"config.json of {name}: intermediate_size is missing; use --shape")
        return layers * dense, layers * dense
    used = int(text.get("num_experts_per_tok") or 1)
    expert = 3 * hidden * int(text.get("moe_intermediate_size") or text.get("intermediate_size") or 0)
    always = experts * hidden  # the router
    shared_width = int(text.get("shared_expert_intermediate_size") or 0)
    if shared_width:
        always += 3 * hidden * shared_width + hidden
    dense_layers = len(text.get("mlp_only_layers") or ())
    step = int(text.get("decoder_sparse_step") or 1)
    sparse = sum(1 for layer in range(layers) if (layer + 1) % step == 0) - dense_layers
    rest = (layers - sparse) * dense
    return sparse * (always + experts * expert) + rest, sparse * (always + used * expert) + rest


def _weight_bytes(config: Mapping[str, Any], text: Mapping[str, Any]) -> float:
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        method = str(quantization.get("quant_method"))
        if method in ("awq", "gptq"):
            bits = int(quantization.get("bits") or quantization.get("w_bit") or 4)
            group = int(quantization.get("group_size") or quantization.get("q_group_size") or 128)
            # Each group has a scale in half precision and a zero point as wide as a weight.
            return (bits + (16 + bits) / group if group > 0 else bits) / 8
        if method == "fp8":
            return 1.0
        raise LightTransferError(
            f"quantization {method}: bytes per weight are not known here; use --weights-gib"
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16")
    # SGLang's --dtype auto serves float32 checkpoints in half precision.
    return 1.0 if "float8" in dtype else 2.0


_KNOWN: dict[str, dict[str, Any]] = json.loads(
    (resources.files(__package__) / "shapes.json").read_text(encoding="utf-8")
)


def _config(name: str) -> dict[str, Any]:
    known = _KNOWN[name]
    return {**(_config(known["like"]) if "like" in known else {}), **known["config"]}


# What lt-sglang plan knows by name.
SHAPES = {
    name: shape_from_config(_config(name), known["label"])
    for name, known in _KNOWN.items()
    if "label" in known
}
# config.json of what is served with dummy weights.
CONFIGS: dict[str, dict[str, Any]] = {
    name: {**_config(name), "max_position_embeddings": known["served_context"]}
    for name, known in _KNOWN.items()
    if "served_context" in known
}
