"""RULER's tasks beside the needles: what prompts hold, sizes, answers that follow from the text alone."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.metrics import METRICS
from lt_sglang.eval.tasks.haystack import NOISE, Prose
from lt_sglang.eval.tasks.ruler import NOUNS
from lt_sglang.eval.tasks.ruler_qa import QaTask
from lt_sglang.eval.tasks.ruler_words import WORD_TASKS, WordsTask, fitted

from .words import Words

TOKENS, TRIALS = 1500, 4


@pytest.fixture(scope="module")
def tokenizer() -> Words:
    return Words()


@pytest.fixture(scope="module")
def prose(tokenizer: Words) -> Prose:
    return Prose.load(tokenizer, None)


def texts(
    name: str, tokenizer: Words, prose: Prose, tokens: int = TOKENS
) -> list[tuple[str, tuple[str, ...]]]:
    items = WordsTask(name, tokens, TRIALS, prose).items(tokenizer)
    assert items == WordsTask(name, tokens, TRIALS, prose).items(tokenizer)
    assert WordsTask(name, tokens, 1, prose).items(tokenizer) == items[:1], "depends on its number alone"
    assert len({item.answers for item in items}) == TRIALS
    for item in items:
        assert 0.9 * tokens < len(item.prompt) <= tokens and dict(item.cell) == {"tokens": tokens}
        assert (item.metric, item.benchmark) == ("contains-all", "RULER")
        assert METRICS[item.metric](", ".join(item.answers).lower(), item.answers, {}) == 1
    return [(tokenizer.decode(list(item.prompt)), item.answers) for item in items]


def test_variables_are_found_by_following_the_assignments(tokenizer: Words, prose: Prose) -> None:
    for text, answers in texts("vt", tokenizer, prose):
        start = text.rindex("Assignments")
        example, prompt = text[:start], text[start:]
        assert NOISE in prompt and NOISE in example
        values: dict[str, str] = {}
        for name, of in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", prompt, re.MULTILINE):
            values[name] = values.get(of, of)
        asked = re.search(
            r"Which variables hold the value (\d{5}) .*\n.*, 5 variables hold the value \1\.", prompt
        )
        assert asked and set(answers) == {name for name, value in values.items() if value == asked[1]}
        assert len(answers) == len(values) == 5
        solved = example.split()[-5:]
        assert all(len(name) == 3 and example.count(f"VAR {name}") in (1, 2) for name in solved)


@pytest.mark.parametrize(("tokens", "often", "seldom"), [(1500, 6, 1), (4200, 30, 3)])
def test_common_words_are_those_repeated_most(
    tokenizer: Words, prose: Prose, tokens: int, often: int, seldom: int
) -> None:
    for text, answers in texts("cwe", tokenizer, prose, tokens):
        listed = re.findall(r"(\d+)\. ([a-z]+)", text[text.rindex("Below is") : text.rindex("\nQuestion")])
        assert [int(place) for place, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert Counter(counts.values()) == {often: 10, seldom: len(counts) - 10}
        assert {word for word, count in counts.items() if count == often} == set(answers)
        # The example is solved in the form that is asked for.
        assert re.search(r"most often are:( \d+\. [a-z]+){10}\nBelow is", text)


def test_frequent_words_follow_a_zeta_distribution(tokenizer: Words, prose: Prose) -> None:
    for text, answers in texts("fwe", tokenizer, prose):
        counts = Counter(re.findall(r"\.\.\.|[a-z]+", text.split("\n")[1])).most_common()
        assert counts[0][0] == "..." and [word for word, _ in counts[1:4]] == list(answers)
        assert counts[3][1] > counts[4][1], "the third and the fourth can be told apart"
        for rank in (2, 3, 4):
            assert counts[rank - 1][1] == pytest.approx(counts[0][1] / rank**2, abs=1)
        assert all(len(word) == 6 for word in answers)


def test_words_that_are_too_few(tokenizer: Words) -> None:
    few = Prose(tuple(tokenizer.encode("so many words")), "a test")
    with pytest.raises(
        LightTransferError, match=r"--text: cwe of 9000 tokens needs more .* than the \d+ there"
    ):
        WordsTask("cwe", 9000, 1, few).items(tokenizer)
    for name in WORD_TASKS:
        with pytest.raises(LightTransferError, match=f"lengths: 60 tokens are too few for {name}"):
            WordsTask(name, 60, 1, few).items(tokenizer)
    assert {len(noun) for noun in NOUNS} >= {4, 6} and min(map(len, NOUNS)) > 3


def test_fitted() -> None:
    tokenizer = Words()
    for room in (5, 6, 7, 40, 41, 1000):
        count = fitted(tokenizer, room, lambda units: "a " * units, 2, 200)
        assert count == min((room - 1) // 2, 200)
    assert fitted(tokenizer, 4, lambda units: "a " * units, 2, 200) == 1


# ---- questions among documents


def _squad(path: Path, version: int) -> str:
    rng = random.Random(0)
    articles: list[dict[str, Any]] = []
    for article in range(8):
        paragraphs = []
        for number in range(5):
            name = f"paragraph{article}x{number}"
            words = " ".join(rng.choice(["tree", "river", "stone", "cloud"]) for _ in range(20))
            asked = {
                "id": name,
                "question": f"What is in {name}?",
                "answers": [
                    {"text": f"gold{name}", "answer_start": 0},
                    {"text": "silver", "answer_start": 0},
                ],
            }
            impossible = {"id": "n", "question": "What is not?", "answers": [], "is_impossible": True}
            qas = [asked] if version == 1 else [{**asked, "is_impossible": False}, impossible]
            paragraphs.append({"context": f"In {name} is gold{name}. {words}", "qas": qas})
        articles.append({"title": f"T{article}", "paragraphs": paragraphs})
    path.write_text(json.dumps({"version": str(version), "data": articles}))
    return str(path)


@pytest.mark.parametrize("version", [1, 2])
def test_squad(tokenizer: Words, tmp_path: Path, version: int) -> None:
    path = _squad(tmp_path / "squad.json", version)
    items = QaTask("qa_1", 800, 6, path).items(tokenizer)
    assert QaTask("qa_1", 800, 2, path).items(tokenizer) == items[:2]
    assert len({item.answers for item in items}) == 6
    places = set()
    for item in items:
        assert 700 < len(item.prompt) <= 800 and item.metric == "contains-any" and len(item.answers) == 2
        text = tokenizer.decode(list(item.prompt))
        documents = re.findall(r"^Document (\d+):\nIn paragraph(\d)x\d", text, re.MULTILINE)
        assert [int(place) for place, _ in documents] == list(range(1, len(documents) + 1))
        asked = re.search(r"Question: What is in (paragraph(\d)x\d)\?\nAnswer:$", text)
        assert asked and item.answers[0] == f"gold{asked[1]}" and text.count(item.answers[0]) == 1
        places.add(int(re.findall(rf"Document (\d+):\nIn {asked[1]}", text)[0]))
        # The whole article is there before any other document is.
        assert Counter(article for _, article in documents)[asked[2]] == 5 < len(documents)
    assert len(places) > 2, "the answer is anywhere"
    assert METRICS["contains-any"]("It is Silver.", items[0].answers, {}) == 1


def test_hotpotqa(tokenizer: Words, tmp_path: Path) -> None:
    path = tmp_path / "hotpot.json"
    asked = [
        {
            "_id": str(n),
            "question": f"Who met person{n}?",
            "answer": f"person{n + 1}",
            "context": [
                [f"Person {n}", [f"This is person{n}.", f" It met person{n + 1}."]],
                [f"Also {n}", ["No."]],
            ],
        }
        for n in range(60)
    ]
    path.write_text(json.dumps(asked))
    for item in QaTask("qa_2", 600, 3, str(path)).items(tokenizer):
        text = tokenizer.decode(list(item.prompt))
        person = re.findall(r"Question: Who met person(\d+)", text)[0]
        assert item.answers == (f"person{int(person) + 1}",)
        assert f":\nPerson {person}\nThis is person{person}. It met {item.answers[0]}.\n" in text
        assert f":\nAlso {person}\nNo.\n" in text and text.count("Document") > 15


def test_questions_that_are_too_few_and_bad_files(tokenizer: Words, tmp_path: Path) -> None:
    path = _squad(tmp_path / "squad.json", 2)
    for tokens, trials, message in (
        (5000, 1, r"--squad .*squad.json: its 40 documents are fewer than qa_1 of 5000 tokens needs"),
        (60, 1, "lengths: 60 tokens are too few for qa_1"),
        (800, 50, r"squad.json: 40 questions with an answer, fewer than --trials 50"),
    ):
        with pytest.raises(LightTransferError, match=message):
            QaTask("qa_1", tokens, trials, path).items(tokenizer)
    bad = tmp_path / "bad.json"
    for name, content, message in (
        ("qa_1", [], "is not a JSON object"),
        (
            "qa_1",
            {"data": [{"paragraphs": [{"context": 3}]}]},
            "data 1: paragraphs 1: context: 3 is not text",
        ),
        ("qa_1", {"data": [{"title": "T"}]}, "data 1: has no 'paragraphs', only title"),
        (
            "qa_2",
            [{"question": "Q", "answer": "A", "context": ["text"]}],
            "record 1: context: is not a list of",
        ),
        (
            "qa_2",
            [{"question": "Q", "context": []}],
            r"bad.json: record 1: has no 'answer', only question, context",
        ),
    ):
        bad.write_text(json.dumps(content))
        with pytest.raises(LightTransferError, match=message):
            QaTask(name, 800, 1, str(bad)).items(tokenizer)
