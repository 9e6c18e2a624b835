"""Lazy layers by a pattern, whatever the model and the prompt: what the paper compares LightTransfer with.

They are written as lazy layers: ``half``, ``all``, ``ends:0.5`` (a share) or ``ends:12`` (a number).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

from lt_sglang.errors import LightTransferError
from lt_sglang.numerals import read_amount

MAX_LAYERS = 1024  # a mistyped number must not fill the memory


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


class Pattern(NamedTuple):
    """How a choice is made.

    full: the full layers of ``num_layers``, given how many they are and a seed.
    counts: whether it is told how many layers are lazy.
    """

    full: Callable[[int, int, int], set[int]]
    counts: bool = True


CHOICES = {
    # Every second layer.
    "half": Pattern(lambda num_layers, keep, seed: set(range(0, num_layers, 2)), counts=False),
    # StreamingLLM (arXiv 2309.17453): sinks and a window in every layer.
    "all": Pattern(lambda num_layers, keep, seed: set(), counts=False),
    "ends": Pattern(_ends),
    "random": Pattern(_random),
    "pyramid": Pattern(_pyramid),
}


class Choice(NamedTuple):
    """name: one of CHOICES. lazy: how many layers are, a number or a share; None where the name says it."""

    name: str
    lazy: int | float | None


def spelling(name: str) -> str:
    """How a choice is written, with a share as an example."""
    return f"{name}:0.5" if CHOICES[name].counts else name


def parse_choice(text: str, label: str = "lazy_layers") -> Choice | None:
    """The choice that ``text`` names, such as ``"ends:0.5"``; None if it names none.

    Args:
        text: as a user wrote it.
        label: what an error calls the field.

    Raises:
        LightTransferError: the number is missing, wrong, or one too many.
    """
    name, colon, amount = text.partition(":")
    if name not in CHOICES:
        return None
    if CHOICES[name].counts == bool(colon):
        lazy = read_amount(amount) if colon else None
        if colon:
            check_amount(f"{label}: {text!r}", lazy)
        return Choice(name, None if isinstance(lazy, str) else lazy)
    raise LightTransferError(f"{label}: {text!r} must be written {spelling(name)}")


def check_amount(label: str, value: object) -> None:
    """Raise LightTransferError unless ``value`` is a number of layers or a share of them."""
    number = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_LAYERS
    if not number and not (isinstance(value, float) and 0 < value < 1):
        raise LightTransferError(
            f"{label}: {value!r} is neither a number of layers from 1 nor a share such as 0.5"
        )


def choose(name: str, num_layers: int, lazy: int | float | None = None, seed: int = 0) -> tuple[int, ...]:
    """The lazy layers of a model, sorted.

    Args:
        name: one of CHOICES.
        num_layers: of the model.
        lazy: how many layers are lazy, a number or a share; None for the choices that say so themselves.
        seed: of the choice 'random'; the others ignore it.

    Raises:
        LightTransferError: an unknown name, or a number of lazy layers outside 0 to num_layers.
    """
    if name not in CHOICES:
        raise LightTransferError(f"lazy_layers: {name!r} is not one of {', '.join(CHOICES)}")
    pattern = CHOICES[name]
    if pattern.counts != (lazy is not None):
        needs = "needs a" if pattern.counts else "takes no"
        raise LightTransferError(f"lazy_layers: {name!r} {needs} number of lazy layers")
    share = isinstance(lazy, float)
    count = round((lazy or 0) * (num_layers if share else 1))
    if not int(share) <= count <= num_layers:
        raise LightTransferError(
            f"lazy_layers: {name}:{lazy} of {num_layers} layers is {count}; 1 to {num_layers} can be lazy"
        )
    full = pattern.full(num_layers, num_layers - count, seed)
    return tuple(layer for layer in range(num_layers) if layer not in full)
