"""A transformers model whose KV heads keep all tokens or sink + recent ones, as told, while it decodes.

A lazy layer is a layer whose heads all have windows; RazorAttention's windows go by head. The prompt is
prefilled once with full attention; then every way to keep its cache decodes greedily, all in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache

QUERIES = 32  # of a prompt's end, by which a score judges layers


def _attend(module: Any, query: Any, key: Any, value: Any, *_: Any, scaling: float, **__: Any) -> Any:
    return module.windows.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("head-windows", _attend)


@dataclass(frozen=True)
class Kept:
    """A way to keep a prompt's cache. windows: bool [layers, KV heads], which heads have windows.

    compensated: such a head also has one key and value, the means of those it dropped, which weigh as many.
    """

    windows: torch.Tensor
    compensated: bool = False


@dataclass(frozen=True)
class Prefilled:
    """tokens: of the prompt. first: the answer's first token. scores: laziness of each layer, by score."""

    cache: list[tuple[torch.Tensor, torch.Tensor]]
    tokens: int
    first: int
    scores: dict[str, list[float]]


class HeadWindows:
    """model: a decoder of Llama's kind, in eval mode, for prompts longer than sink + recent tokens."""

    def __init__(self, model: Any, sink: int, recent: int) -> None:
        self.model, self.sink, self.recent = model, sink, recent
        self.layers: int = model.config.num_hidden_layers
        self.kv_heads: int = model.config.num_key_value_heads
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._watch: Callable[..., None] | None = None
        self._stream: dict[int, torch.Tensor] = {}
        model.set_attn_implementation("head-windows")
        for index, block in enumerate(model.model.layers):
            block.self_attn.windows = self
            block.register_forward_pre_hook(self._input_of(index))

    def _input_of(self, layer: int) -> Any:
        def keep(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            self._stream[layer] = args[0][0, -QUERIES:].float()

        return keep

    def layers_kept(self, lazy: Collection[int]) -> Kept:
        """Windows in all heads of the layers ``lazy``."""
        rows = torch.tensor([layer in lazy for layer in range(self.layers)])
        return Kept(rows[:, None].expand(-1, self.kv_heads))

    def share(self, kept: Kept, tokens: int) -> float:
        """Of the memory that full attention takes for a prompt."""
        window = self.sink + self.recent + kept.compensated
        return 1 - float(kept.windows.float().mean()) * (1 - window / tokens)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """[batch, queries, heads, dim]: causal attention to a whole prompt, or of one query as told."""
        if self._kept is not None:
            windows, compensated = (part.to(query.device) for part in self._kept)
            return attention(
                query, key, value, scaling, windows[:, layer], compensated, self.sink, self.recent
            )
        if self._watch is not None:
            self._watch(layer, query, key, value, scaling)
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    @torch.inference_mode()
    def watch(self, ids: Sequence[int], seen: Callable[..., None]) -> tuple[DynamicCache, torch.Tensor]:
        """Run a prompt; ``seen`` gets each layer's number, queries, keys, values and scale."""
        cache = DynamicCache()
        self._watch = seen
        tokens = torch.tensor([list(ids)], device=self.model.device)
        logits = self.model(tokens, past_key_values=cache, logits_to_keep=1).logits
        self._watch = None
        return cache, logits[0, -1]

    def prefill(self, ids: Sequence[int]) -> Prefilled:
        """Full attention, and how lazy each layer is for the prompt's last queries."""
        scores: dict[str, list[float]] = {"residual-error": [], "lighttransfer": []}

        def seen(layer: int, query: Any, key: Any, value: Any, scaling: float) -> None:
            for name, score in self._laziness(layer, query, key, value, scaling).items():
                scores[name].append(score)

        cache, logits = self.watch(ids, seen)
        parts = [(layer.keys, layer.values) for layer in cache.layers]
        return Prefilled(parts, len(ids), int(logits.argmax()), scores)

    def _laziness(self, layer: int, query: Any, key: Any, value: Any, scaling: float) -> dict[str, float]:
        tokens = key.shape[2]
        weights = causal_weights(query, key, scaling, tokens - QUERIES)[0]
        position = torch.arange(tokens, device=key.device)
        near = (position < self.sink) | (position >= tokens - self.recent)
        inside = weights * near
        mass = inside.sum(-1, keepdim=True)
        values = value[0].float().repeat_interleave(len(weights) // self.kv_heads, 0)
        change = ((weights - inside / mass) @ values).transpose(0, 1).flatten(1)
        project = self.model.model.layers[layer].self_attn.o_proj
        error = torch.nn.functional.linear(change, project.weight.float()).norm(dim=1)
        worst = (error / self._stream[layer].norm(dim=1)).max()
        return {"residual-error": -float(worst), "lighttransfer": float(mass.mean())}

    @torch.inference_mode()
    def answers(self, prompt: Prefilled, ways: Sequence[Kept], new_tokens: int) -> list[list[int]]:
        """Greedy tokens after the prompt, of each way to keep its cache."""
        cache = DynamicCache()
        for layer, parts in enumerate(prompt.cache):
            cache.update(*(part.expand(len(ways), -1, -1, -1) for part in parts), layer)
        windows = torch.stack([way.windows for way in ways])
        self._kept = windows, torch.tensor([way.compensated for way in ways])
        device = self.model.device
        out = [torch.full((len(ways),), prompt.first, device=device)]
        for step in range(new_tokens - 1):
            at = torch.full((len(ways), 1), prompt.tokens + step, device=device)
            logits = self.model(out[-1][:, None], past_key_values=cache, position_ids=at).logits
            out.append(logits[:, -1].argmax(1))
        self._kept = None
        return torch.stack(out, 1).tolist()


def causal_weights(query: torch.Tensor, key: torch.Tensor, scaling: float, first: int) -> torch.Tensor:
    """float32 [batch, heads, queries from ``first`` on, keys]: full attention's weights."""
    rows = query[:, :, first:].float()
    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = rows @ keys.mT * scaling
    tokens = torch.arange(first, first + rows.shape[2], device=key.device)
    later = torch.arange(key.shape[2], device=key.device) > tokens[:, None]
    return scores.masked_fill_(later, float("-inf")).softmax(-1)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    windows: torch.Tensor,
    compensated: torch.Tensor,
    sink: int,
    recent: int,
) -> torch.Tensor:
    """[batch, 1, heads, dim] of one query [batch, heads, 1, dim], which is the last position.

    windows: bool [batch, KV heads]. compensated: bool [batch].
    """
    dropped = key.shape[2] - sink - recent
    far = slice(sink, sink + max(dropped, 0))
    grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    scores = (grouped @ key.mT).float() * scaling
    scores[..., far].masked_fill_(windows[:, :, None, None], float("-inf"))
    if dropped > 0 and compensated.any():
        mean_key, mean_value = (part[:, :, far].float().mean(2, keepdim=True) for part in (key, value))
        extra = grouped.float() @ mean_key.mT * scaling + torch.tensor(float(dropped)).log()
        without = ~(windows & compensated[:, None])[:, :, None, None]
        weights = torch.cat([scores, extra.masked_fill(without, float("-inf"))], 3).softmax(3)
        out = weights[..., :-1].to(value.dtype) @ value + (weights[..., -1:] * mean_value).to(value.dtype)
    else:
        out = scores.softmax(3).to(value.dtype) @ value
    return out.flatten(1, 2)[:, None]
