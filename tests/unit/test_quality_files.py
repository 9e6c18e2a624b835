"""Readers of published files: small files of each format, and what is said of bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import Item
from lt_sglang.eval.metrics import METRICS
from lt_sglang.eval.tasks.files import Reading, read
from lt_sglang.eval.tasks.longbench import LONGBENCH, OF_THE_PAPER, longbench, longbench_v2
from lt_sglang.eval.tasks.published import ifeval, longmemeval, mathematics

from .words import Words

LINE = {
    "input": "Who?",
    "context": "word " * 200,
    "answers": ["Ann", "Anne"],
    "all_classes": None,
    "length": 9,
}
CHOICE = {
    "_id": "1",
    "domain": "D",
    "sub_domain": "S",
    "difficulty": "easy",
    "length": "short",
    "question": "Which {one}?",
    "choice_A": "red",
    "choice_B": "blue",
    "choice_C": "green",
    "choice_D": "none",
    "answer": "C",
    "context": "The door is green.",
}
MEMORY = {
    "question_id": "q1",
    "question_type": "multi-session",
    "question": "Which car?",
    "answer": "a red car",
    "question_date": "2023/05/30 (Tue) 23:40",
    "haystack_dates": ["2023/05/21 (Sun) 02:00", "2023/05/20 (Sat)"],
    "haystack_session_ids": ["b", "a"],
    "haystack_sessions": [
        [{"role": "user", "content": "I sold it."}, {"role": "assistant", "content": "Good."}],
        [{"role": "user", "content": "I have a red car.", "has_answer": True}],
    ],
    "answer_session_ids": ["a"],
}
FOLLOW = {
    "key": 1,
    "prompt": "Write two words, without commas.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"relation": "less than", "num_words": 3, "num_bullets": None}],
}


def reading(tokenizer: Words | None = None, max_tokens: int = 1000, **options: Any) -> Reading:
    return Reading(tokenizer or Words(), max_tokens=max_tokens, **options)


def shown(tokenizer: Words, item: Item) -> str:
    return tokenizer.decode(list(item.prompt))


def lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def folder(root: Path, **data: list[dict[str, Any]]) -> str:
    (root / "config").mkdir(exist_ok=True)
    (root / "data").mkdir(exist_ok=True)
    prompts = {name: f"Read {{context}}. {{input}} [{name}]" for name in LONGBENCH}
    (root / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    (root / "config" / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(LONGBENCH, 32)))
    for name, records in data.items():
        lines(root / "data" / f"{name.replace('repobench_p', 'repobench-p')}.jsonl", *records)
    return str(root)


def test_longbench_has_all_tasks(tmp_path: Path) -> None:
    english = set(LONGBENCH) - {"multifieldqa_zh", "dureader"}
    assert len(english) == len(OF_THE_PAPER) == 16 and {"dureader"} == set(OF_THE_PAPER) - english
    assert set(LONGBENCH.values()) <= set(METRICS)
    classes = {"all_classes": ["Ann", "City"]}
    path = folder(tmp_path, **{name: [{**LINE, **classes}] for name in LONGBENCH})
    items = longbench(path, reading())
    assert [(item.task, item.metric) for item in items] == list(LONGBENCH.items())
    for item in items:
        assert METRICS[item.metric](item.answers[0], item.answers, item.details) == (
            0 if item.metric in ("retrieval", "count") else 1
        )


def test_longbench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Words()
    braces = {**LINE, "context": "c {input} {x}", "input": "Q", "all_classes": ["City", "Ann"]}
    path = folder(tmp_path, hotpotqa=[LINE, LINE], trec=[braces])
    items = longbench(path, reading(tokenizer, chat=True))
    assert [item.task for item in items] == ["hotpotqa", "hotpotqa", "trec"]
    assert capsys.readouterr().err.startswith("lt-sglang: --longbench: not there: narrativeqa, qasper, ")
    assert items[0].answers == ("Ann", "Anne") and items[0].new_tokens == 32
    assert items[2].details == {"all_classes": ["City", "Ann"], "first_line": True}
    text = shown(tokenizer, items[0])
    assert text.startswith("[USER] Read word word") and text.endswith("Who? [hotpotqa] [ANSWER]")
    assert shown(tokenizer, items[2]) == "Read c {input} {x}. Q [trec]", (
        "few-shot tasks take no chat template"
    )
    (short, _) = longbench(path, reading(tokenizer, max_tokens=50), ["hotpotqa"])
    assert len(short.prompt) == 51
    text = shown(tokenizer, short)
    assert text.startswith("Read word") and text.endswith("Who? [hotpotqa]")
    assert len(longbench(path, reading(count=1), ["hotpotqa"])) == 1


def test_longbench_v2(tmp_path: Path) -> None:
    """As an array and as lines; the middle of a long context is left out."""
    tokenizer = Words()
    (tmp_path / "data.json").write_text(
        json.dumps([CHOICE, {**CHOICE, "length": "long", "context": "x " * 900}], indent=1)
    )
    one, other = longbench_v2(str(tmp_path / "data.json"), reading(tokenizer, max_tokens=300))
    assert longbench_v2(lines(tmp_path / "data.jsonl", CHOICE), reading(tokenizer)) == [one]
    assert (one.task, one.answers, one.metric, one.benchmark) == ("short", ("C",), "choice", "LongBench v2")
    text = shown(tokenizer, one)
    assert "The door is green." in text and "Which {one}?\n(A) red\n(B) blue\n(C) green\n(D) none\n" in text
    assert other.task == "long" and len(other.prompt) == 301 and "(C) green" in shown(tokenizer, other)


def test_longmemeval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Words()
    preference = {**MEMORY, "question_type": "single-session-preference"}
    path = lines(
        tmp_path / "s.json", MEMORY, {**MEMORY, "question_id": "q2_abs"}, preference, {**MEMORY, "answer": 3}
    )
    item, number = longmemeval(path, reading(tokenizer))
    assert capsys.readouterr().err.splitlines() == [
        "lt-sglang: --longmemeval: 1 questions left out: abstention cannot be graded here",
        "lt-sglang: --longmemeval: 1 questions left out: single-session-preference cannot be graded here",
    ]
    assert number.answers == ("3",) and (item.task, item.benchmark) == ("multi-session", "LongMemEval")
    text = shown(tokenizer, item)
    first, second = (
        text.index("2023/05/20 (Sat):\nuser: I have a red car."),
        text.index("user: I sold it.\nassistant: Good."),
    )
    assert first < second < text.index("Today is 2023/05/30 (Tue) 23:40.\nQuestion: Which car?\nAnswer:")
    assert METRICS[item.metric]("It was red, a fine red one.", item.answers, {}) == 0.5
    (short,) = longmemeval(lines(tmp_path / "one.json", MEMORY), reading(tokenizer, max_tokens=20))
    assert "sold" not in shown(tokenizer, short) and "Which car?" in shown(tokenizer, short)


def test_ifeval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    language = {
        **FOLLOW,
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "kn"}],
    }
    path = lines(tmp_path / "ifeval.jsonl", FOLLOW, language, FOLLOW)
    one, _ = ifeval(path, reading())
    assert capsys.readouterr().err == (
        "lt-sglang: --ifeval: 1 prompts left out: language:response_language cannot be graded here\n"
    )
    assert (one.task, one.new_tokens, one.answers) == ("ifeval", 1280, tuple(FOLLOW["instruction_id_list"]))
    for answer, followed in (("Good morning", 1), ("Good, bad", 0), ("one two three", 0), (" ", 0)):
        assert METRICS[one.metric](answer, one.answers, one.details) == followed


def test_mathematics(tmp_path: Path) -> None:
    """GSM8K, MATH-500 and AIME as they are published."""
    tokenizer = Words()
    for name, record, answer, metric in (
        ("gsm8k", {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}, "4", "gsm8k"),
        (
            "math500",
            {
                "problem": "Convert.",
                "solution": "s",
                "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": "test/precalculus/807.json",
            },
            "\\left( 3, \\frac{\\pi}{2} \\right)",
            "math",
        ),
        ("aime", {"ID": "2024-II-4", "Problem": "?", "Solution": "", "Answer": 33}, "33", "aime"),
        ("aime", {"id": 60, "problem": "?", "answer": "073", "url": "", "year": "2024"}, "073", "aime"),
    ):
        path = lines(tmp_path / "file.jsonl", record)
        (item,) = mathematics(name, path, reading(tokenizer, new_tokens=256))
        assert (item.answers, item.metric, item.new_tokens) == ((answer,), metric, 256)
        (asked,) = mathematics(name, path, reading(tokenizer, chat=True))
        assert shown(tokenizer, asked).startswith("[USER]")


def _without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("reader", "record", "message"),
    [
        (
            longbench_v2,
            _without(CHOICE, "choice_D"),
            r"--longbench-v2 .*bad.jsonl: line 2: has no 'choice_D', only _id, ",
        ),
        (longbench_v2, {**CHOICE, "answer": "E"}, r'line 2: answer: "E" is not one of A, B, C, D'),
        (
            longbench_v2,
            {**CHOICE, "length": "huge"},
            'line 2: length: "huge" is not one of short, medium, long',
        ),
        (longbench_v2, {**CHOICE, "context": None}, "line 2: context: null is not text"),
        (
            longmemeval,
            {**MEMORY, "question_type": "x"},
            r'line 2: question_type: "x" is not one of single-session-user',
        ),
        (longmemeval, {**MEMORY, "haystack_dates": []}, "haystack_dates: 0 of them, but 2 haystack_sessions"),
        (
            longmemeval,
            {**MEMORY, "haystack_sessions": [[{"role": "user"}], []]},
            "haystack_sessions: has no 'content'",
        ),
        (longmemeval, _without(MEMORY, "answer"), "line 2: has no 'answer'"),
        (ifeval, {**FOLLOW, "kwargs": [{}]}, "line 2: kwargs: 1 of them, but 2 in instruction_id_list"),
        (
            ifeval,
            {**FOLLOW, "kwargs": [{}, {"relation": "at least"}]},
            "line 2: kwargs 2: has no 'num_words', only relation",
        ),
        (
            ifeval,
            {**FOLLOW, "kwargs": [{}, {"relation": "about", "num_words": 3}]},
            r'kwargs 2: relation: "about" is not one of less than, at least',
        ),
        (
            ifeval,
            {**FOLLOW, "kwargs": [{}, {"relation": "at least", "num_words": "3"}]},
            'num_words: "3" is not a whole number',
        ),
    ],
)
def test_a_bad_record_is_named(
    reader: Callable[[str, Reading], list[Item]], record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = {longbench_v2: CHOICE, longmemeval: MEMORY, ifeval: FOLLOW}[reader]
    path = lines(tmp_path / "bad.jsonl", good, record)
    assert len(reader(path, reading(count=1))) == 1
    with pytest.raises(LightTransferError, match=message):
        reader(path, reading())


def test_bad_folders_and_files(tmp_path: Path) -> None:
    path = folder(tmp_path, hotpotqa=[LINE], trec=[LINE])
    for names, message in (
        (["narrative"], "'narrative' is not one of narrativeqa, "),
        (["qasper"], r"--longbench .*qasper.jsonl: cannot be read"),
        (["trec"], r"trec.jsonl: line 1: all_classes: null is not a list"),
    ):
        with pytest.raises(LightTransferError, match=message):
            longbench(path, reading(), names)
    (tmp_path / "data" / "hotpotqa.jsonl").write_text(json.dumps({**LINE, "answers": []}))
    with pytest.raises(LightTransferError, match=r"line 1: answers: \[\] is not text, nor a list of text"):
        longbench(path, reading(), ["hotpotqa"])
    with pytest.raises(LightTransferError, match=r"dataset2prompt.json cannot be read"):
        longbench(str(tmp_path / "no"), reading())
    for file in (tmp_path / "data").iterdir():
        file.unlink()
    with pytest.raises(LightTransferError, match=r"has no data/NAME.jsonl of narrativeqa, "):
        longbench(path, reading())
    bad = tmp_path / "bad.jsonl"
    for content, message in (
        ("{}\n", "line 1: needs 'question' or 'problem', and 'answer'"),
        ('{"question": 1, "answer": 2}\n\n{"que', "line 3 is not valid JSON"),
        ("{\n", "line 1 is not valid JSON"),
        ("[\n1,\n{]", "line 3 is not valid JSON"),
        ("[1]\n", "record 1 is not a JSON object"),
        ("1\n", "line 1 is not a JSON object"),
        ("\n", "holds no record"),
    ):
        bad.write_text(content)
        with pytest.raises(LightTransferError, match=message):
            mathematics("gsm8k", str(bad), reading())
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(LightTransferError, match=r"--gsm8k .*bad.jsonl: cannot be read"):
        read(bad, "--gsm8k")
