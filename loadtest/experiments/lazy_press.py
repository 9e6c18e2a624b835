"""Windows in a list of layers and kvpress' SnapKV in the others (arXiv 2410.13846, appendix C.2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

SNAPKV_SHARE = 0.5  # of a prompt's tokens, which SnapKV keeps in a full layer


def press(snapkv: Any, lazy: Collection[int], sink: int, recent: int, kept: float = 1.0) -> Any:
    """kvpress' class SnapKVPress, with sink + recent tokens in the layers ``lazy``.

    kept: share of a prompt's tokens that SnapKV keeps in the other layers; 1 leaves them whole.
    """

    class LazyPress(snapkv):
        def compress(self, module: Any, hidden: Any, keys: Any, values: Any, *more: Any) -> Any:
            if module.layer_idx not in lazy:
                return super().compress(module, hidden, keys, values, *more)
            return tuple(window(part, sink, recent) for part in (keys, values))

    return LazyPress(compression_ratio=1 - kept)


@contextmanager
def one_prefill(model: Any, presses: Mapping[str, Any]) -> Iterator[dict[str, DynamicCache]]:
    """Caches by name, filled while ``model`` prefills a prompt: what each press keeps; None keeps all."""
    caches = {name: DynamicCache() for name in presses}

    def after(module: Any, _args: Any, kwargs: dict[str, Any], output: tuple[torch.Tensor, ...]) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for name, one in presses.items():
            parts = layer.keys, layer.values
            if one is not None:
                parts = one.compress(module, kwargs["hidden_states"], *parts, output[1], kwargs)
            caches[name].update(*parts, module.layer_idx)

    hooks = []
    for block in model.model.layers:
        block.self_attn.rotary_emb = model.model.rotary_emb  # as kvpress does
        hooks.append(block.self_attn.register_forward_hook(after, with_kwargs=True))
    try:
        yield caches
    finally:
        for hook in hooks:
            hook.remove()


def window(part: torch.Tensor, sink: int, recent: int) -> torch.Tensor:
    """The first ``sink`` and the last ``recent`` tokens of keys or values [batch, heads, tokens, dim]."""
    if part.shape[2] <= sink + recent:
        return part
    return torch.cat([part[:, :, :sink], part[:, :, -recent:]], 2)


def share(layers: int, lazy: int, window_share: float, kept: float = 1.0) -> float:
    """Of full attention's memory: ``lazy`` layers with windows, ``kept`` of the tokens in the others."""
    return ((layers - lazy) * kept + lazy * min(1, window_share)) / layers
