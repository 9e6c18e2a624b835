"""Theorem F.3 of arXiv 2410.13846 (5.1 in short), as printed and derived again for Llama-like models.

Errors are the largest row's norm of the difference between a model and the same model with lazy layers, e_i
that of the residual stream behind layer i. A lazy layer has its windows for all queries, as in the theorem.
s_i is the attention mass that a lazy layer i would discard in the full model: the mean over heads, of the
worst query.

``step`` and ``printed`` are (4) and (5). ``Toy`` is the transformer of appendix F as printed: LN projects
onto the unit ball, no weight's Frobenius norm is above B, the MLP is a ReLU between two weights. The printed
proof bounds what a lazy layer adds by the mass that the hybrid discards there. For the full model's s_i one
has to replace in the other order, first the mask, then the input; Lemma G.3 holds under any mask: (4) stays.

RMSNorm, RoPE, grouped heads and gated MLPs are not in the theorem. ``Bounds`` is (4) derived again for them,
with each layer's own constants. Exact, from the weights: norms. Measured in the full model, for one prompt
(``Measured``): the mass by head and query, each head's largest value, the smallest row that is normalised.
Nothing is estimated.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.linalg import matrix_norm

SINK = 4
SILU = 1.1  # SiLU's Lipschitz constant is 1.0998
LAYERS, HIDDEN = 6, 16  # of a toy


def seen(tokens: int, recent: int) -> torch.Tensor:
    """bool [tokens, tokens]: which keys a query of a lazy layer sees."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    return (key <= query) & ((key < SINK) | (query - key < recent))


def rows(difference: torch.Tensor) -> float:
    """The norm of the theorem: the largest of the rows' Euclidean norms."""
    return float(difference.norm(dim=-1).max())


def step(e: float, s: float, norm: float, heads: int, lip: float = 1.0) -> float:
    """(4): the most that e_i can be. e: e_(i-1). s: s_i, 0 if layer i is not lazy. norm: B. lip: L_lip."""
    factor = heads * norm + lip * norm**2 + 4 * heads * norm**3
    amplified = factor * min(2.0, (1 + heads * norm * (1 + 4 * norm**2)) * e)
    return e + amplified + 2 * heads * (norm + lip * norm**3) * s


def printed(s: float, layers: int, norm: float, heads: int, lip: float = 1.0) -> float:
    """(5): the most that the logits' error can be. s: the sum over lazy layers."""
    constant = 2 * layers * norm**2 * (heads + lip * norm + 4 * heads * norm**2)
    return constant + 2 * heads * norm**2 * (1 + lip * norm**2) * s


class Toy:
    """The transformer of appendix F in float64; every weight's Frobenius norm is ``norm``."""

    def __init__(self, seed: int, heads: int, norm: float, layers: int = LAYERS) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.Tensor:
            drawn = torch.randn(*shape, HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
            return drawn * norm / matrix_norm(drawn, keepdim=True)

        self.query, self.key, self.value = (weight(layers, heads) for _ in range(3))
        self.first, self.second, self.unembed = weight(layers), weight(layers), weight()

    def run(
        self, x: torch.Tensor, lazy: Collection[int], mask: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[float]]:
        """The states behind 0, 1, ... layers, then the logits; and the mass each layer discards, or would."""
        causal = torch.ones_like(mask).tril()
        states, masses = [x], []
        for layer in range(len(self.query)):
            z = _onto_ball(x)
            scores = z @ self.query[layer] @ self.key[layer].mT @ z.T
            weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
            masses.append(float((weights * ~mask).sum(-1).mean(0).max()))
            if layer in lazy:
                weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            x = x + (weights @ z @ self.value[layer]).sum(0)
            x = x + (_onto_ball(x) @ self.first[layer]).relu() @ self.second[layer]
            states.append(x)
        return [*states, x @ self.unembed], masses


def _onto_ball(x: torch.Tensor) -> torch.Tensor:
    """The theorem's LN."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1)


def toy(seed: int, heads: int, norm: float, tokens: int = 48, recent: int = 12) -> dict[str, float]:
    """One toy, half of its layers lazy; AssertionError where (4) or (5) does not hold.

    step: true over allowed, of the layer that is closest to (4).
    """
    model, mask = Toy(seed, heads, norm), seen(tokens, recent)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    lazy = random.Random(seed).sample(range(LAYERS), LAYERS // 2)
    full, masses = model.run(x, (), mask)
    hybrid, _ = model.run(x, lazy, mask)
    *errors, logits = (rows(one - other) for one, other in zip(full, hybrid, strict=True))
    unrolled, closest = 0.0, 0.0
    for layer, (before, after) in enumerate(itertools.pairwise(errors)):
        s = masses[layer] if layer in lazy else 0.0
        unrolled, most = step(unrolled, s, norm, heads), step(before, s, norm, heads)
        assert after <= min(most, unrolled), f"(4), seed {seed}, layer {layer}: {after} > {most}, {unrolled}"
        closest = max(closest, after / most if most else 0.0)
    mass = sum(masses[layer] for layer in lazy)
    bound = printed(mass, LAYERS, norm, heads)
    assert logits <= min(bound, norm * unrolled), f"(5), seed {seed}: {logits} > {bound}, {norm * unrolled}"
    told = {"mass": mass, "error": errors[-1], "recursion": unrolled, "step": closest, "logits": logits}
    return told | {"bound": bound, "mass_in_bound": 1 - printed(0.0, LAYERS, norm, heads) / bound}


@dataclass(frozen=True)
class Measured:
    """Of one layer of the full model, for one prompt.

    last, worst: the discarded mass, the mean over heads, of the last queries (eq. 1) and of the worst (s_i).
    injected, most: what a mask in this layer alone changes, and its bound by the mass (Lemma G.4).
    values: float64 [heads], the largest norm of a value behind the output projection.
    before, between: the smallest norm of a row, eps included, that goes into its first and second RMSNorm.
    """

    last: float
    worst: float
    injected: float
    most: float
    values: torch.Tensor
    before: float
    between: float


class Bounds:
    """(4) for one layer of a Llama-like model: dense, with SiLU."""

    def __init__(self, layer: Any) -> None:
        attention, mlp, size = layer.self_attn, layer.mlp, layer.self_attn.head_dim
        scales = layer.input_layernorm.weight.double()
        query, key, value = (
            (one.weight.double() * scales).unflatten(0, (-1, size))
            for one in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        key, value = (one.repeat_interleave(len(query) // len(key), 0) for one in (key, value))
        out = attention.o_proj.weight.double().unflatten(1, (-1, size)).transpose(0, 1)
        # A product's norms are those of its factors' triangles.
        product = torch.linalg.qr(out).R @ torch.linalg.qr(value.mT).R.mT
        self.radius = radius = math.sqrt(len(scales))
        self.values = matrix_norm(product, 2)
        self.slope = 2 * radius * attention.scaling * matrix_norm(query, 2) * matrix_norm(key, 2)
        if hasattr(attention, "q_norm") or attention.q_proj.bias is not None:
            self.slope = torch.full_like(self.slope, math.inf)  # the cap of 2 holds whatever the scores are
        scales = layer.post_attention_layernorm.weight.double()
        gate, up = (one.weight.double() * scales for one in (mlp.gate_proj, mlp.up_proj))
        down = mlp.down_proj.weight.double()
        gates, ups, downs = spectral(gate), spectral(up), spectral(down)
        gate_row, up_row = (float(one.norm(dim=1).max()) for one in (gate, up))
        self.gain = downs * radius * (SILU * gates * up_row + gate_row * ups)
        self.cap = 2 * downs * radius**2 * min(gate_row * ups, gates * up_row)
        scale = radius * math.sqrt(attention.scaling)
        weights = (scale * query, scale * key, radius * product, radius * gate, radius * up, down)
        self.frobenius = max(float(matrix_norm(one).max()) for one in weights)

    def step(self, e: float, found: Measured, lazy: bool) -> float:
        """The most that e_i can be.

        A head changes by its values' change, and by its weights' change (2 at most, Lemma G.1) times its
        largest value; a lazy layer adds Lemma G.4. silu(x) y changes by either factor's change times the
        largest of the other, and by twice its largest norm at most.
        """
        change = found.most if lazy else 0.0
        if e:
            moved = turned(self.radius, e, found.before)
            weights = (2 * self.slope * moved).clamp(max=2)
            change += float((self.values * moved + found.values * weights).sum())
        return e + change + min(self.gain * turned(self.radius, e + change, found.between), self.cap)


def turned(radius: float, e: float, lowest: float) -> float:
    """How far apart two rows can be behind RMSNorm (its weight left out) that were ``e`` apart before.

    radius: sqrt(hidden). lowest: what the norm of one of them is at least, eps included. With
    sqrt(hidden eps) as one more coordinate, |x/|x| - y/|y|| <= 2 |x - y| / (|x| + |y|), and |y| >= |x| - e.
    """
    return radius * min(2.0, 2 * e / max(2 * lowest - e, lowest))


def spectral(weight: torch.Tensor) -> float:
    """The largest singular value."""
    small = weight if len(weight) < weight.shape[1] else weight.mT
    return math.sqrt(float(torch.linalg.eigvalsh(small @ small.mT)[-1]))
