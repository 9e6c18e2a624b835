"""loadtest/experiments/lazy_press.py: what each layer keeps. kvpress itself is not installed here."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from loadtest.experiments import lazy_press

SINK, RECENT, TOKENS, LAYERS = 2, 5, 20, 4


@dataclass
class SnapKV:
    """Stands for kvpress' class: keeps every n-th token."""

    compression_ratio: float = 0.0

    def compress(self, module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        step = round(1 / (1 - self.compression_ratio))
        return keys[:, :, ::step], values[:, :, ::step]


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_lazy_layers_have_windows_and_the_others_snapkv(kept: float) -> None:
    keys, values = torch.randn(2, 1, 3, TOKENS, 8)
    press = lazy_press.press(SnapKV, (1, 2), SINK, RECENT, kept)
    held = 0
    for layer in range(LAYERS):
        found = press.compress(SimpleNamespace(layer_idx=layer), None, keys, values, None, {})
        at = [0, 1, *range(15, 20)] if layer in (1, 2) else list(range(0, TOKENS, round(1 / kept)))
        assert torch.equal(found[0], keys[:, :, at]) and torch.equal(found[1], values[:, :, at])
        held += len(at)
    assert lazy_press.share(LAYERS, 2, (SINK + RECENT) / TOKENS, kept) == pytest.approx(
        held / LAYERS / TOKENS
    )


def test_a_prompt_within_the_window_keeps_all() -> None:
    keys = torch.randn(1, 3, SINK + RECENT, 8)
    assert torch.equal(lazy_press.window(keys, SINK, RECENT), keys)
    assert lazy_press.share(LAYERS, 2, 1.7) == 1


def test_one_prefill_fills_a_cache_for_each_press() -> None:
    """What a press keeps of full attention's keys and values, whatever the other presses keep."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, num_key_value_heads=2)  # type: ignore[arg-type]
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(TOKENS)[None]
    plain, used = DynamicCache(), DynamicCache()
    presses = {"half": SnapKV(0.5), "all": None, "lazy": lazy_press.press(SnapKV, (1, 2), SINK, RECENT)}
    with torch.inference_mode():
        expected = model(ids, past_key_values=plain).logits
        with lazy_press.one_prefill(model, presses) as caches:
            logits = model(ids, past_key_values=used).logits
        model(ids[:, :1], past_key_values=used)
    assert torch.equal(logits, expected)
    for layer, whole in enumerate(plain.layers):
        at = {"half": list(range(0, TOKENS, 2)), "all": list(range(TOKENS))}
        at["lazy"] = [0, 1, *range(15, 20)] if layer in (1, 2) else at["all"]
        for name, cache in caches.items():
            assert torch.equal(cache.layers[layer].keys, whole.keys[:, :, at[name]])
            assert torch.equal(cache.layers[layer].values, whole.values[:, :, at[name]])
