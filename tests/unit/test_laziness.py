"""loadtest.experiments.laziness: ratios and what is told of them, on small tensors."""

from __future__ import annotations

import pytest
import torch

from loadtest.experiments.laziness import BLOCK, RECENT, SINK, _ratio, summary


def test_a_ratio_is_the_mass_on_the_first_and_the_last_keys() -> None:
    """Against a loop over heads and queries."""
    keys, queries, heads = RECENT + 60, 5, 3
    weights = torch.rand(heads, queries, keys, generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for head in range(heads):
        for query in range(queries):
            own = keys - queries + query
            seen = [key for key in range(own + 1) if key < SINK or key > own - RECENT]
            expected += float(weights[head, query, seen].sum()) / (heads * queries)
    assert float(_ratio(weights)) == pytest.approx(expected, rel=1e-5)


def test_choices_that_stay_and_choices_that_turn_around() -> None:
    prompt = torch.linspace(0, 1, 10)[:, None]
    stays = prompt.expand(-1, 1 + 2 * BLOCK)
    turned = torch.cat([stays[:, : 1 + BLOCK], stays[:, :BLOCK].flip(0)], dim=1)
    found = summary([stays])
    assert found["same_layers_by_block"] == [1.0, 1.0] and found["between_tokens"] == 0.0
    assert found["rank_correlation_by_block"] == [1.0, 1.0]
    found = summary([turned])
    assert found["same_layers_by_block"] == [1.0, 0.0] and found["rank_correlation_by_block"] == [1.0, -1.0]
    assert found["prompt_by_layer"] == pytest.approx(prompt[:, 0].tolist(), abs=1e-4)
    assert summary([stays, turned])["same_layers_by_block"] == [1.0, 0.5]
