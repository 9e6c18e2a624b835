"""KL divergence from truncated distributions, against the whole ones."""

from __future__ import annotations

import math

import pytest
import torch

from lt_sglang.eval.divergence import divergence, kl_of_tops


def _logprobs(seed: int, vocabulary: int = 200, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(vocabulary, generator=generator, dtype=torch.float64) * spread).log_softmax(0)


def _top(logprobs: torch.Tensor, count: int) -> dict[int, float]:
    values, tokens = logprobs.topk(count)
    return dict(zip(tokens.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_everything_seen_is_exact(seed: int) -> None:
    p, q = _logprobs(seed), _logprobs(seed) + 0.3 * _logprobs(seed + 100)
    q = q.log_softmax(0)
    expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
    found, seen = kl_of_tops(_top(p, 200), _top(q, 200))
    assert found == pytest.approx(expected, rel=1e-9)
    assert seen == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_more_tokens_come_closer_from_below(seed: int) -> None:
    p = _logprobs(seed)
    q = (p + 0.3 * _logprobs(seed + 100)).log_softmax(0)
    exact, _ = kl_of_tops(_top(p, 200), _top(q, 200))
    bounds = [kl_of_tops(_top(p, count), _top(q, count)) for count in (5, 20, 80, 200)]
    assert all(bound <= exact + 1e-12 for bound, _ in bounds)
    assert [seen for _, seen in bounds] == sorted(seen for _, seen in bounds)
    assert bounds[2][0] > 0.7 * exact


def test_tokens_of_one_side_join_the_rest() -> None:
    p = {1: math.log(0.5), 2: math.log(0.3)}
    q = {1: math.log(0.4), 3: math.log(0.5)}
    found, seen = kl_of_tops(p, q)
    assert seen == pytest.approx(0.5)
    assert found == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6))


def test_positions_are_averaged() -> None:
    p, q = {1: math.log(0.5), 2: math.log(0.5)}, {1: math.log(0.25), 2: math.log(0.75)}
    found = divergence([p, p], [p, q])
    assert found.largest == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found.mean == pytest.approx(found.largest / 2)
    assert found.positions == 2
    for other in ([], [p]):
        with pytest.raises(ValueError, match="cannot be compared"):
            divergence([p, p] if other else [], other)
