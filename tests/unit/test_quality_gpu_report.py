"""loadtest/experiments/quality*.py: texts that were not cached count nowhere; differences are paired."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from loadtest.experiments import quality
from loadtest.experiments.quality import CONFIGS, FULL, kl_of, reaches_keys, step_of
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


def _window(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """What the engine of a configuration is told of its windows."""
    given = {"device": "cuda", "pool_tokens": 1000, "memory": 0.5, "kv_cache_dtype": None, "top": 8}
    args = Namespace(model="m", baseline_backend="triton", limit_s=1.0, **given)
    engine = step_of(name, spec, args).engine
    config: dict[str, Any] = json.loads(engine["json_model_override_args"])["lighttransfer"]
    return config


def test_prompts_for_a_longer_window_leave_the_others_as_they_are() -> None:
    """Table 7: keys stand before 2044 tokens, and only the configuration that says so has such windows."""
    spec: dict[str, Any] = {"recent_tokens": 1020, "keys_outside": 2044, "kl": []}
    spec["keys"] = [{"prompt": [0] * 8, "new_tokens": 1}]
    for score in ("lighttransfer", "residual"):
        names = [name for name in CONFIGS if re.match(rf"{score}-50(-(recent|sink|last)-\d+)?$", name)]
        found = [_window(name, spec) for name in names]
        windows = {key: {one.get(key, 32) for one in found} for key in ("recent_tokens", "sink_tokens")}
        assert windows == {"recent_tokens": {252, 508, 1020, 2044}, "sink_tokens": {0, 2, 4, 6}}
        assert {one.get("last_queries", 32) for one in found} == {8, 16, 32, 64}
        # Each differs from the default in one of the three.
        for name, one in zip(names, found, strict=True):
            default = {"recent_tokens": 1020, "sink_tokens": 4, "last_queries": 32}
            differs = [key for key, value in default.items() if one.get(key, value) != value]
            assert len(differs) == (name != f"{score}-50"), name
    assert _window("lower-50", spec)["recent_tokens"] == _window("residual-25", spec)["recent_tokens"] == 1020


def test_keys_and_windows_are_written_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Texts:
        @staticmethod
        def passages(*_: Any) -> list[list[int]]:
            return []

    asked: list[int] = []

    def questions(_tokenizer: Any, _lengths: Any, _trials: int, outside: int, _seed: int) -> list[Any]:
        asked.append(outside)
        return []

    for name, stands_for in {
        "ensure_model": lambda: "m",
        "HfTokenizer": lambda path: path,
        "key_questions": questions,
        "Prose": Namespace(load=lambda *_: Texts),
    }.items():
        monkeypatch.setattr(quality, name, stands_for)
    file = tmp_path / "prompts.json"
    for given, outside in (([], 1020), (["--keys-outside", "2044"], 2044)):
        monkeypatch.setattr("sys.argv", ["quality", str(file), "--write", *given])
        quality.main()
        spec = json.loads(file.read_text())
        assert (spec["recent_tokens"], spec["keys_outside"], asked.pop()) == (1020, outside, outside)


def test_a_window_that_reaches_the_keys_is_left_out() -> None:
    spec: dict[str, Any] = {"recent_tokens": 1020, "keys": [{}]}
    assert [name for name in CONFIGS if reaches_keys(name, spec)] == [
        "lighttransfer-50-recent-2044",
        "residual-50-recent-2044",
    ]
    assert not any(reaches_keys(name, spec | {"keys_outside": 2044}) for name in CONFIGS)
    assert not reaches_keys("residual-50-recent-2044", spec | {"keys": []}), "texts have no keys"


def test_configurations_of_the_document_exist() -> None:
    """Every list of --configs that is written out in docs/quality.md."""
    text = (Path(__file__).resolve().parents[2] / "docs/quality.md").read_text(encoding="utf-8")
    lists = re.findall(r"--configs\s+([\w,.-]+)", text.replace("\\\n", ""))
    named = [set(one.split(",")) - {"..."} for one in lists]
    assert len(named) >= 3 and all(names <= set(CONFIGS) and FULL in names for names in named)
