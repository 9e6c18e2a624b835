"""Seeded LoRA adapters of the tiny models, made by peft."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lt_sglang.files import ensure_folder

from .models import ensure_model

# name -> rank
ADAPTERS = {"red": 4, "blue": 8}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter_folder(model: Path, name: str) -> Path:
    """Where the adapter ``name`` of a tiny model lies, made or not."""
    return model.parent / f"{model.name}-lora-{name}"


def ensure_adapted_model(family: str) -> Path:
    """The folder of the tiny model of ``family``; its adapters, beside it, are made on the first call."""
    model = ensure_model(family)
    for number, (name, rank) in enumerate(ADAPTERS.items()):
        ensure_folder(adapter_folder(model, name), partial(_make, model, rank, number))
    return model


def _make(model: Path, rank: int, seed: int, out: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # Both factors random: peft's own beginning, B = 0, changes nothing.
    config = LoraConfig(
        r=rank, lora_alpha=4 * rank, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(base, config).save_pretrained(out)
