"""True model shapes; their weights are dummies, which gives true speeds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMON = {
    "max_position_embeddings": 600000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 128,
    "num_key_value_heads": 8,
}


@dataclass(frozen=True)
class Shape:
    """half, three_quarters: lazy layers of static mode. keep: layers that dynamic mode keeps full."""

    name: str
    config: dict[str, Any]
    half: str
    three_quarters: str
    keep: int
    sink: int = 4
    recent: int = 1020

    @property
    def vocab(self) -> int:
        """Token ids."""
        return int(self.config["vocab_size"])

    def folder(self) -> Path:
        """A model folder with this configuration and no weights."""
        folder = Path("/tmp/lt-shapes") / self.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**COMMON, **self.config}))
        return folder


MISTRAL_7B = Shape(
    "mistral-7b",
    {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 40960,
    },
    half="8-23",
    three_quarters="4-27",
    keep=16,
)
QWQ_32B = Shape(
    "qwq-32b",
    {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "vocab_size": 152064,
        "max_position_embeddings": 40960,
        "use_sliding_window": False,
    },
    half="5-24,26-28,30-33,35,37,38,43,51",
    three_quarters="5-52",
    keep=32,
    sink=129,
    recent=1025,
)
LLAMA_70B = Shape(
    "llama-3-70b",
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "vocab_size": 128256,
    },
    half="20-59",
    three_quarters="10-69",
    keep=40,
)
SHAPES = {shape.name: shape for shape in (MISTRAL_7B, QWQ_32B, LLAMA_70B)}
