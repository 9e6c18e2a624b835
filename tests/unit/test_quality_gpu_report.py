"""loadtest/experiments/quality*.py: texts that were not cached count nowhere; differences are paired."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.experiments.quality import kl_of
from loadtest.experiments.quality_results import dots, keys_entries, kl_entries, spearman

TOKENS = 8
TOP = [[[1, -0.1], [2, -2.4]]]


def _sides(cached: list[int]) -> list[dict[str, Any]]:
    return [{"cached_tokens": tokens, "tops": TOP} for tokens in cached]


def _spec(texts: int) -> dict[str, Any]:
    return {"kl": [{"prompt": [0] * TOKENS, "continuation": [0, 0]}] * texts}


@pytest.mark.parametrize(
    ("full", "light"), [([TOKENS, 0, TOKENS], [TOKENS] * 3), ([TOKENS] * 3, [TOKENS, TOKENS - 1, TOKENS])]
)
def test_uncached_texts_do_not_count(full: list[int], light: list[int]) -> None:
    """On either side, and in their places."""
    found = kl_of(_spec(3), _sides(full), _sides(light))
    assert [one is None for one in found] == [False, True, False]
    assert found[0] is not None and found[0].mean == 0


def test_half_of_the_texts_is_enough() -> None:
    """And fewer are not: an engine without room says little of the texts that happened to stay."""
    every = _sides([TOKENS] * 4)
    assert kl_of(_spec(4), every, _sides([TOKENS, TOKENS, 0, 0])).count(None) == 2
    with pytest.raises(ValueError, match="1 of 4 texts"):
        kl_of(_spec(4), every, _sides([TOKENS, 0, 0, 0]))


def test_dots_skip_them() -> None:
    """Masses stay beside their own texts."""
    masses = [[0.9, 0.5], [0.8, 0.4], [0.7, 0.3]]
    decisions = [{"laziness": mass, "lazy_layers": [0]} for mass in masses]
    report: dict[str, Any] = {
        "lighttransfer-50": {"lighttransfer": {}, "kl": {"decisions": decisions, "texts": [1.0, None, 3.0]}},
        "list": {
            "lighttransfer": {"lazy_layers": "1"},
            "kl": {"decisions": [None] * 3, "texts": [None, 5.0, 6.0]},
        },
    }
    found = dots(report)
    assert found["lighttransfer-50"] == [(pytest.approx(0.1), 1.0), (pytest.approx(0.3), 3.0)]
    assert found["list"] == [(pytest.approx(0.6), 5.0), (pytest.approx(0.7), 6.0)]
    for entry in report.values():
        entry["config"] = None
    entries = kl_entries(report, found)
    assert entries["list"]["kl"] == {"texts": [None, 5.0, 6.0]}
    assert entries["list"]["discarded_mass"] == pytest.approx([0.6, 0.7])
    assert entries["list"]["spearman_of_its_texts"] == pytest.approx(1)
    assert spearman([(0.5, 1.0), (0.5, 2.0)]) is None


def test_differences_are_paired() -> None:
    """By question, from each configuration asked for."""
    answers = {"full": [True, True, True, False], "a": [True, False, False, False], "b": [True, True] * 2}
    report = {
        name: {"config": None, "cells": {}, "trials": [{"found": hit} for hit in hits]}
        for name, hits in answers.items()
    }
    found = keys_entries(report, ["a"])
    assert found["full"]["differences"]["a"]["mean"] == 0.5 and found["b"]["differences"]["a"]["mean"] == 0.75
    assert found["a"]["differences"]["a"]["mean"] == 0 and set(found["b"]["differences"]) == {"a"}
    low, high = found["b"]["differences"]["a"]["interval"]
    assert low < 0.75 < high
