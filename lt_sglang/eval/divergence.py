"""KL divergence between two engines' next-token distributions, from what their HTTP endpoints report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Top = Mapping[int, float]  # token id -> log-probability, base e; the most likely ones of one position


@dataclass(frozen=True)
class Divergence:
    """KL(full || lightened) over some positions, in nats a position.

    mean, largest: over the positions. seen: mean share of full attention's probability that lies on tokens
    both engines reported; the rest is one class of its own, so ``mean`` is a lower bound that is exact as
    ``seen`` goes to 1.
    """

    mean: float
    largest: float
    seen: float
    positions: int


def kl_of_tops(full: Top, light: Top) -> tuple[float, float]:
    """KL of one position in nats, and full attention's probability of the tokens it was computed on.

    Tokens that only one engine reports are put into one class with the rest. Merging classes can only lower
    a KL divergence (data processing inequality).
    """
    shared = full.keys() & light.keys()
    p_seen = math.fsum(math.exp(full[token]) for token in shared)
    q_seen = math.fsum(math.exp(light[token]) for token in shared)
    kl = math.fsum(math.exp(full[token]) * (full[token] - light[token]) for token in shared)
    # Below a float32 logarithm's rounding there is no rest to speak of.
    p_rest, q_rest = 1 - p_seen, 1 - q_seen
    if p_rest > 1e-6 and q_rest > 1e-6:
        kl += p_rest * math.log(p_rest / q_rest)
    return max(kl, 0.0), min(p_seen, 1.0)


def divergence(full: Sequence[Top], light: Sequence[Top]) -> Divergence:
    """Over the positions of one continuation; raises ValueError if they differ in number or are none."""
    if len(full) != len(light) or not full:
        raise ValueError(f"{len(full)} and {len(light)} positions cannot be compared")
    found = [kl_of_tops(p, q) for p, q in zip(full, light, strict=True)]
    kls = [kl for kl, _ in found]
    return Divergence(
        mean=math.fsum(kls) / len(kls),
        largest=max(kls),
        seen=math.fsum(seen for _, seen in found) / len(found),
        positions=len(found),
    )
