"""Seeded prompts of token ids."""

from __future__ import annotations

import math
import random

from .models import FIRST_TOKEN, VOCAB_SIZE


def random_prompt(length: int, rng: random.Random) -> list[int]:
    """``length`` tokens, none of them special."""
    return [rng.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(length)]


def edge_lengths(sinks: int, recent: int, longest: int) -> list[int]:
    """Lengths at which something changes: sinks, window, both, the prefill chunk of 256, and the longest."""
    edges = {
        1,
        sinks,
        recent - 1,
        recent,
        recent + 1,
        sinks + recent,
        sinks + recent + 1,
        255,
        256,
        257,
        longest,
    }
    return sorted(length for length in edges if length > 0)


def mixed_prompts(sinks: int, recent: int, longest: int, count: int, seed: int) -> list[list[int]]:
    """``count`` prompts in random order: every edge length, the longest twice, the rest log-uniform."""
    rng = random.Random(seed)
    lengths = [*edge_lengths(sinks, recent, longest), longest]
    while len(lengths) < count:
        lengths.append(round(math.exp(rng.uniform(0, math.log(longest)))))
    rng.shuffle(lengths)
    return [random_prompt(length, rng) for length in lengths]
