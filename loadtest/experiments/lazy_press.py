"""Windows in a list of layers and kvpress' SnapKV in the others (arXiv 2410.13846, appendix C.2)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

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


def window(part: torch.Tensor, sink: int, recent: int) -> torch.Tensor:
    """The first ``sink`` and the last ``recent`` tokens of keys or values [batch, heads, tokens, dim]."""
    if part.shape[2] <= sink + recent:
        return part
    return torch.cat([part[:, :, :sink], part[:, :, -recent:]], 2)


def share(layers: int, lazy: int, window_share: float, kept: float = 1.0) -> float:
    """Of full attention's memory: ``lazy`` layers with windows, ``kept`` of the tokens in the others."""
    return ((layers - lazy) * kept + lazy * min(1, window_share)) / layers
