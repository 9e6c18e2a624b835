"""Generators of questions: sizes, depths, seeds."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.tasks.haystack import NOISE, Prose, documentation, split_sentences
from lt_sglang.eval.tasks.passkey import MARGIN_TOKENS, PasskeyTask
from lt_sglang.eval.tasks.ruler import DEPTHS, SHAPES, NiahTask

from .words import Words


@pytest.mark.parametrize("keys", [1, 3])
def test_keys_are_stated_outside_the_window(keys: int) -> None:
    tokenizer = Words()
    items = PasskeyTask(900, 7, keys=keys, window=200).items(tokenizer)
    assert [item.cell["depth"] for item in items] == [0, 0.167, 0.333, 0.5, 0.667, 0.833, 1]
    first_at = []
    for item in items:
        assert len(item.prompt) == 900 and item.prompt[0] == 0
        text = tokenizer.decode(list(item.prompt))
        (key,) = item.answers
        assert text.count(key) == 2
        assert len(set(re.findall(r"\d{5}", text))) == keys
        ids = list(item.prompt)
        digits = tokenizer.encode(key)
        places = [n for n in range(len(ids)) if ids[n : n + 5] == digits]
        assert len(places) == 2
        # The last statement ends before the window of the question's last token, with a margin.
        every = [n for n, token in enumerate(ids) if tokenizer.decode([token]).isdigit()]
        assert max(every) <= 900 - 200 - MARGIN_TOKENS
        first_at.append(places[0])
        whose = re.search(r"What is the pass key((?: of the \w+)?)\? The pass key\1 is$", text)
        assert whose and f"The pass key{whose[1]} is {key}." in text
    if keys == 1:
        assert first_at == sorted(first_at) and first_at[0] < 15


def test_questions_depend_on_the_seed_alone() -> None:
    """Not on how many are drawn before, nor on the tasks beside it."""
    tokenizer = Words()
    seven = PasskeyTask(900, 7, window=200).items(tokenizer)
    assert seven == PasskeyTask(900, 7, window=200).items(tokenizer)
    other = PasskeyTask(900, 7, window=200, seed=1).items(tokenizer)
    assert all(a.answers != b.answers for a, b in zip(seven, other, strict=True))
    assert len({item.prompt[:100] for item in seven}) == 7, "prompts must not share their first block"


def test_too_short_for_its_window() -> None:
    with pytest.raises(LightTransferError, match=r"tokens: 300 is too short .* from 3[0-9]+ on"):
        PasskeyTask(300, 1, window=200).items(Words())


@pytest.mark.parametrize("name", SHAPES)
def test_ruler(name: str) -> None:
    tokenizer = Words()
    shape = SHAPES[name]
    prose = Prose.load(tokenizer, None)
    items = NiahTask(name, 1500, 4, prose).items(tokenizer)
    assert items == NiahTask(name, 1500, 4, prose).items(tokenizer)
    for item in items:
        assert 1300 < len(item.prompt) <= 1500
        text = tokenizer.decode(list(item.prompt))
        assert len(item.answers) == shape.num_values * shape.num_queries
        needles = re.findall(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.", text)
        asked = re.search(r"special magic \w+ for (.*) mentioned in the provided text\? ", text)
        assert asked
        queried = re.split(r", and |, ", asked[1])
        assert {value for _, key, value in needles if key in queried} == set(item.answers)
        if shape.haystack != "needle":
            assert len(needles) == max(shape.num_keys, shape.num_queries) * shape.num_values
        else:
            assert len(needles) > 20
        assert (NOISE in text) == (shape.haystack == "noise")
        one = len(item.answers) == 1
        assert text.startswith("A special magic" if one else "Some special magic")
        assert text.endswith("text is" if one else "text are")


def test_ruler_depths_differ() -> None:
    tokenizer = Words()
    items = NiahTask("niah_single_1", 1500, 60).items(tokenizer)
    needle = [tokenizer.decode(list(item.prompt)).index("One of") for item in items]
    assert len(set(needle)) > DEPTHS // 4
    assert min(needle) < 300 and max(needle) > 2500


def test_prose(tmp_path: Path) -> None:
    tokenizer = Words()
    assert len(documentation()) > 200_000
    prose = Prose(tuple(range(100)), "a test")
    cut = list(prose.passages(4, 20, random.Random(0)))
    assert all(ids == list(range(ids[0], ids[0] + 20)) for ids in cut)
    assert len({token for ids in cut for token in ids}) == 80, "passages overlap"
    with pytest.raises(LightTransferError, match="a test has 100 tokens, the task needs 101"):
        prose.passage(101, random.Random(0))
    with pytest.raises(LightTransferError, match="--text /nowhere: cannot be read"):
        Prose.load(tokenizer, "/nowhere")
    (tmp_path / "blank").write_text(" \n")
    with pytest.raises(LightTransferError, match="blank: holds no text"):
        Prose.load(tokenizer, str(tmp_path / "blank"))
    assert split_sentences("One.  Two!\nThree?") == ["One.", "Two!", "Three?"]
