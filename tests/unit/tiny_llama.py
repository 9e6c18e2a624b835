"""A tiny seeded Llama in transformers, for what is held against its own attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, KV_HEADS = 4, 4, 2


def llama() -> Any:
    """Of 50 tokens, always with the same weights, in eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()
