"""The demo model in transformers with windows in any layers, for many choices of layers at once.

selection_ideas.py asks it. Evidence of what a layer would lose is in float32, as in an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loadtest.experiments.quality import SINKS

QUERIES = 32  # the last ones of a prompt
AT_ONCE = 32
Seen = dict[str, torch.Tensor]

# Higher: keep it full. Tensors of ``Watcher``.
SCORES: dict[str, Callable[[Seen], torch.Tensor]] = {
    "residual-error": lambda s: (s["error"] / s["stream"]).amax(1),
    "error-mass": lambda s: (s["error"] / s["stream"]).amax(1) * (1 - s["mass"]).amax((1, 2)),
    "discarded-mass": lambda s: (1 - s["mass"]).amax((1, 2)),
    "peak": lambda s: s["peak"].amax((1, 2)),
    "peak, times residual error": lambda s: (s["error"] / s["stream"]).amax(1) * s["peak"].amax((1, 2)),
    "residual error, max squared by mean": lambda s: (
        (s["error"] / s["stream"]).amax(1) ** 2 / (s["error"] / s["stream"]).mean(1)
    ),
}
SERVED = ("residual-error", "error-mass")


class Bench:
    """The model in bfloat16; evidence in float32.

    recent: of a lazy layer. Windows are given as recent tokens by layer; ``everything`` is full attention.
    """

    everything = 1 << 30

    def __init__(self, model: str, device: str, recent: int) -> None:
        self.device, self.recent = device, recent
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self.model.to(device).eval()
        self.blocks = self.model.model.layers
        self.layers = len(self.blocks)
        self._windows: torch.Tensor | None = None  # [sets, layers]
        self._watch: Callable[..., None] | None = None
        for index, block in enumerate(self.blocks):
            block.self_attn.register_forward_pre_hook(self._masked(index), with_kwargs=True)
            block.self_attn.register_forward_hook(self._watched(index), with_kwargs=True)
            block.register_forward_pre_hook(self._entered(index), with_kwargs=True)
        self._streams: list[torch.Tensor] = []

    def windows(self, lazy: Collection[int]) -> list[int]:
        """Windows by layer of a set of lazy layers."""
        return [self.recent if layer in lazy else self.everything for layer in range(self.layers)]

    def _masked(self, index: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if self._windows is None:
                return args, kwargs
            rows = kwargs["hidden_states"].shape[1]
            past = kwargs["past_key_values"].layers[index].keys.shape[2]
            query = torch.arange(past, past + rows, device=self.device)[:, None]
            key = torch.arange(past + rows, device=self.device)[None, :]
            near = (query - key)[None] < self._windows[:, index, None, None]
            mask = (key <= query)[None] & ((key < SINKS)[None] | near)
            return args, {**kwargs, "attention_mask": mask[:, None]}

        return before

    def _entered(self, index: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if self._watch is not None:
                self._streams.append(args[0] if args else kwargs["hidden_states"])

        return before

    def _watched(self, index: int) -> Any:
        def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._watch is not None:
                self._watch(index, module, kwargs)

        return after

    @torch.inference_mode()
    def observe(
        self,
        ids: Sequence[int],
        cache: DynamicCache,
        rows: Sequence[int],
        windows: Sequence[int] | None = None,
    ) -> Seen:
        """Run ``ids`` after what ``cache`` holds; evidence of the queries ``rows``, counted within ``ids``.

        [layers, heads, rows] mass, peak; [layers, rows] error, stream. All are those of a layer with full
        attention against the same layer with its window, whatever ``windows`` says the run itself has.
        """
        past = cache.get_seq_length()
        end = past + len(ids)
        at = torch.tensor(list(rows), device=self.device)
        query_at, key_at = (at + past)[:, None], torch.arange(end, device=self.device)[None, :]
        # The last queries are held against the tokens that would stay, as in an engine; earlier ones
        # against their own windows.
        last = int(at[0]) + past >= end - QUERIES
        near = key_at >= end - self.recent if last else query_at - key_at < self.recent
        kept, causal = (key_at < SINKS) | near, key_at <= query_at
        found: dict[str, list[torch.Tensor]] = {"mass": [], "peak": [], "error": [], "stream": []}

        def watch(index: int, module: Any, kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"][:, at]
            heads = (1, len(at), -1, module.head_dim)
            query = module.q_proj(hidden).view(heads).transpose(1, 2)
            cos, sin = (part[:, at] for part in kwargs["position_embeddings"])
            query, _ = apply_rotary_pos_emb(query, query, cos, sin)
            layer = cache.layers[index]
            groups = query.shape[1] // layer.keys.shape[1]
            keys = layer.keys[0].float().repeat_interleave(groups, 0)
            values = layer.values[0].float().repeat_interleave(groups, 0)
            scores = query[0].float() @ keys.transpose(1, 2) * module.scaling
            weights = scores.masked_fill(~causal, float("-inf")).softmax(2)
            part = weights * kept
            mass = part.sum(2)
            lost = (weights - part / mass[..., None].clamp(min=1e-20)) @ values
            error = lost.transpose(0, 1).flatten(1) @ module.o_proj.weight.float().T
            found["mass"].append(mass)
            found["peak"].append((weights - part).amax(2))
            found["error"].append(error.norm(dim=1))
            found["stream"].append(self._streams[index][0, at].float().norm(dim=1))

        self._watch, self._streams = watch, []
        if windows is not None:
            self._windows = torch.tensor([list(windows)], device=self.device)
        try:
            ids_on = torch.tensor([list(ids)], device=self.device)
            self.model(ids_on, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            self._watch, self._windows, self._streams = None, None, []
        return {name: torch.stack(values).cpu() for name, values in found.items()}

    def copy(self, cache: DynamicCache, tokens: int, sets: int = 1) -> DynamicCache:
        """The first ``tokens`` positions, for ``sets`` sequences."""
        new = DynamicCache()
        for index, layer in enumerate(cache.layers):
            parts = (part[:, :, :tokens].expand(sets, -1, -1, -1) for part in (layer.keys, layer.values))
            new.update(*parts, index)
        return new

    @torch.inference_mode()
    def forced(
        self, cache: DynamicCache, ids: Sequence[int], start: int, windows: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Log-probabilities [sets, len(ids) - 1 - start, vocabulary] of what follows ids[start:-1]."""
        tokens = cache.get_seq_length()
        outs = []
        for first in range(0, len(windows), AT_ONCE):
            some = [list(one) for one in windows[first : first + AT_ONCE]]
            self._windows = torch.tensor(some, device=self.device)
            try:
                fed = torch.tensor([list(ids[:-1])] * len(some), device=self.device)
                logits = self.model(
                    fed,
                    past_key_values=self.copy(cache, tokens, len(some)),
                    use_cache=True,
                    logits_to_keep=len(ids) - 1 - start,
                ).logits
            finally:
                self._windows = None
            outs.append(logits.float().log_softmax(2))
        return torch.cat(outs)

    def tried(
        self, cache: DynamicCache, ids: Sequence[int], start: int, windows: Sequence[Sequence[int]]
    ) -> tuple[bool, list[tuple[bool, float]]]:
        """Is full attention right; and of each set: is it right, KL divergence in nats a position."""
        full = (self.everything,) * self.layers
        sets = list(dict.fromkeys([full, *map(tuple, windows)]))
        logs = self.forced(cache, ids, start, sets)
        target = torch.tensor(list(ids[start + 1 :]), device=self.device)
        right = (logs.argmax(2) == target).all(1).tolist()
        kl = (logs[0].exp() * (logs[0] - logs)).sum(2).mean(1).tolist()
        found = dict(zip(sets, zip(right, kl, strict=True), strict=True))
        return right[0], [found[tuple(one)] for one in windows]
