"""The GPU script's questions and verdicts for LightTransfer-Train, without a GPU."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import pytest

from loadtest.experiments.train_quality import LAYERS, Bench, Sizes, _compare, lists
from loadtest.experiments.train_task import SENTENCES, WORDS, context, questions, training_lines
from tests.unit.test_train_data import CHATML, _plain


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = copy.deepcopy(_plain())
    made.add_special_tokens({"eos_token": "<|im_end|>"})
    made.chat_template = CHATML
    return made


def test_training_and_test_share_nothing() -> None:
    for kind in (0, 1):
        assert not {*WORDS["train"][kind]} & {*WORDS["test"][kind]}
    assert not {*SENTENCES["train"]} & {*SENTENCES["test"]}


def test_keys_stand_outside_the_window(tokenizer: Any) -> None:
    """Every key, in every context, before the last ``behind`` tokens; one token is a byte here."""
    for seed in range(5):
        made = context(tokenizer, random.Random(seed), "test", keys=6, tokens=3000, behind=900)
        assert len(made.keys) == 6
        for place, digits in made.keys.items():
            assert made.text.count(f"The pass key of the {place} is {digits}.") == 1
        assert len(made.text) - made.text.rindex("The pass key") > 900
        assert 2900 < len(made.text) < 3100


def test_questions(tokenizer: Any) -> None:
    asked = questions(tokenizer, "test", count=4, keys=3, tokens=3000, window=500)
    for one in asked:
        text = tokenizer.decode(one.prompt)
        place = text.rpartition("The pass key of the ")[2].removesuffix(" is")
        assert f"The pass key of the {place} is{tokenizer.decode(one.digits)}." in text
        assert text.endswith(f"<|im_start|>assistant\nThe pass key of the {place} is")
        assert len(one.prompt) + len(one.digits) <= 3000
    again = questions(tokenizer, "test", count=4, keys=3, tokens=3000, window=500)
    assert [one.prompt for one in again] == [one.prompt for one in asked]
    pilot = questions(tokenizer, "pilot", count=4, keys=3, tokens=3000, window=500)
    assert not {tuple(one.prompt) for one in pilot} & {tuple(one.prompt) for one in asked}


def test_training_lines(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from loadtest.experiments import train_task

    monkeypatch.setattr(train_task, "TEXT_PACKAGES", ("accelerate",))
    lines = list(training_lines(tokenizer, 6, tokens=3000, window=500, text_tokens=100, most_keys=4))
    assert ["messages" in line for line in lines] == [True, True, False] * 2
    for line in lines:
        if "messages" in line:
            turns = line["messages"]
            for asked, told in zip(turns[::2], turns[1::2], strict=True):
                place = asked["content"].rpartition("of the ")[2].removesuffix("?")
                assert told["content"] in turns[0]["content"] and place in told["content"]


def test_lists_have_the_shares_they_say() -> None:
    shares = {name: len(layers) / LAYERS for name, layers in lists().items()}
    assert shares["full"] == 0
    assert shares["three quarters"] == shares["ends"] == pytest.approx(0.75, abs=0.02)
    assert shares["seven eighths"] == pytest.approx(0.875, abs=0.02)


def test_how_many_keys_are_hard_enough() -> None:
    """Answers fall as keys rise; the number nearest the middle of 70 to 95 % is found in a few tries."""

    class Fake(Bench):
        def __init__(self) -> None:
            self.sizes = Sizes()

        def asked(self, split: str, count: int, keys: int) -> Any:
            assert split == "pilot"
            return [keys] * count

        def answered(self, model: Any, asked: Any) -> list[bool]:
            right = round(len(asked) * max(0.0, 1 - asked[0] / model.worst))
            return [number < right for number in range(len(asked))]

    for worst, wanted in ((60, {8, 12}), (1000, {120}), (1, {1})):
        keys, tried = Fake().hard_enough(SimpleNamespace(worst=worst))
        assert keys in wanted and len(tried) <= 5


def test_verdicts() -> None:
    def arm(right: int, perplexity: float) -> dict[str, Any]:
        answers = [number < right for number in range(120)]
        return {"right": right, "of": 120, "answers": answers, "perplexity": perplexity}

    out: dict[str, Any] = {}
    arms = {"full, trained": arm(100, 10.0), "three quarters, trained": arm(97, 10.09)}
    arms["seven eighths, trained"] = arm(89, 10.2)
    _compare(out, arms)
    assert list(out["verdicts"].values()) == [True, True, True, False, False] and not out["pass"]
    out = {}
    _compare(out, {"full, trained": arm(119, 10.0)})
    assert not out["pass"]
