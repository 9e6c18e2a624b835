"""Lazy layers chosen without looking at a prompt: what the paper compares LightTransfer with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from lt_sglang.errors import LightTransferError


def _all(num_layers: int, keep: int, seed: int) -> set[int]:
    """StreamingLLM (arXiv 2309.17453): sinks and a window in every layer."""
    if keep != 0:
        raise LightTransferError(f"keep: the choice 'all' makes every layer lazy, so keep is 0, not {keep}")
    return set()


def _ends(num_layers: int, keep: int, seed: int) -> set[int]:
    """LongGen (arXiv 2410.01485): full attention in the middle, lazy layers at both ends.

    If the lazy layers cannot be halved, the deep end gets one more.
    """
    first = (num_layers - keep) // 2
    return set(range(first, first + keep))


def _random(num_layers: int, keep: int, seed: int) -> set[int]:
    """Layers drawn at random, the same in every process and under every version of Python."""

    def draw(layer: int) -> bytes:
        return hashlib.sha256(f"{seed}:{layer}".encode()).digest()

    return set(sorted(range(num_layers), key=draw)[:keep])


def _pyramid(num_layers: int, keep: int, seed: int) -> set[int]:
    """PyramidKV's direction (arXiv 2406.02069): the deeper a layer, the smaller its cache.

    PyramidKV gives layer l of L a budget that falls linearly from the first layer to the last, and fills it
    with the tokens that the prompt's last queries attend to most, head by head. Kept of it, layer by layer:

    - layers 0 to keep - 1: a full cache, above PyramidKV's budget for a shallow layer;
    - layers keep to L - 1: w_sink + w_recent tokens, its smallest budget, in place of the falling ones.

    So the order of the layers' budgets and their total remain. The slope between them does not, as a layer
    has one of two cache lengths here; nor does the choice of tokens, which are sinks and a window.
    """
    return set(range(keep))


_CHOICES: dict[str, Callable[[int, int, int], set[int]]] = {
    "all": _all,
    "ends": _ends,
    "random": _random,
    "pyramid": _pyramid,
}
CHOICES = tuple(_CHOICES)
# The layers that a configuration names, cut behind each request's prompt; CHOICES become static lists.
LIST = "list"


def choose(name: str, num_layers: int, keep: int, seed: int = 0) -> tuple[int, ...]:
    """Lazy layers of a model of ``num_layers``, sorted, when ``keep`` layers keep full attention.

    Args:
        seed: of the choice 'random'; the others ignore it.

    Raises LightTransferError for an unknown name, a keep outside 0 to num_layers, or one other than 0
    with 'all'.
    """
    if name not in _CHOICES:
        raise LightTransferError(f"choice: {name!r} is not one of {', '.join(CHOICES)}")
    if not 0 <= keep <= num_layers:
        raise LightTransferError(f"keep: {keep} is not a number of layers from 0 to {num_layers}")
    full = _CHOICES[name](num_layers, keep, seed)
    return tuple(layer for layer in range(num_layers) if layer not in full)
