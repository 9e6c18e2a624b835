"""Tiny seeded models of every supported family, with a tokenizer, for servers on a CPU.

Each is made once per machine: its folder is named after a hash of everything that decides its content.
The weights are drawn wide (initializer_range 0.2), so that greedy outputs wander through the vocabulary
and depend on what attention sees; with usual ranges a tiny model repeats one token whatever it reads.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lt_sglang.files import cache_home, ensure_folder

NUM_LAYERS = 6
VOCAB_SIZE = 512
EOS = 2
FIRST_TOKEN = 3  # below are pad, bos and eos
CONTEXT = 8192
SEED = 7

# Raise it when this file makes other content from the same definitions.
REVISION = 1

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}

# model_type of transformers -> what differs from COMMON
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": {
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 64,
        # SGLang gates a shared expert in a Triton kernel, which a CPU interprets: qwen2_moe_shared has one.
        "shared_expert_intermediate_size": 0,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    # Qwen1.5-MoE's shape: a shared expert beside the others, wider than they are, behind a gate of its own.
    "qwen2_moe_shared": {
        "model_type": "qwen2_moe",
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 160,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
    },
    "mixtral": {**EXPERTS, "num_local_experts": 4, "sliding_window": None},
    # One KV head for all, which every tensor-parallel rank then holds.
    "llama_mqa": {"model_type": "llama", "num_key_value_heads": 1},
}


def ensure_model(family: str, seed: int = SEED, layers: int = NUM_LAYERS) -> Path:
    """The folder of the tiny model of ``family``, made on the first call on this machine.

    seed: of its weights.

    The folder appears by a rename once it is complete, so concurrent callers are safe.
    """
    target = model_folder(family, seed, layers)
    return ensure_folder(target, lambda out: _make(family, out, seed, layers))


def model_folder(family: str, seed: int = SEED, layers: int = NUM_LAYERS) -> Path:
    """Where the tiny model of ``family`` lies, made or not."""
    definition = {"revision": REVISION, "family": family, **_settings(family, layers)}
    if seed != SEED:
        definition["seed"] = seed
    key = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]
    return cache_home() / "test-models" / f"tiny-{family}-{key}"


def _settings(family: str, layers: int) -> dict[str, Any]:
    return {**COMMON, "num_hidden_layers": layers, **FAMILIES[family]}


def _make(family: str, out: Path, seed: int, layers: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"model_type": family, **_settings(family, layers)})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Biases start at 0 and norms at 1; a family that has them is to be told from one that has none.
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(out)
    _tokenizer().save(str(out / "tokenizer.json"))
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n", encoding="utf-8")


def _tokenizer() -> Any:
    """One token a byte; the rest of the vocabulary are words of their own, so that every token decodes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"word{i}" for i in range(VOCAB_SIZE - len(special) - len(letters))]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
