"""Comparing outcomes, the table, the figures, and what the command refuses."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lt_sglang.cli import main
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.endpoint import Continued
from lt_sglang.eval.evaluate import Outcome, Questions, compare, divergences
from lt_sglang.eval.items import Item
from lt_sglang.eval.plots import depth_heatmaps
from lt_sglang.eval.report import as_dict, table

TURNS = ["--suite", "conversations", "--engine", "a", "--engine", "b", "--model-path", "m"]
TRIALS = 40
TEXTS = 20


def _questions() -> Questions:
    keys = [
        Item("passkey", (1, 2), ("5",), 4, "begins", {"tokens": tokens, "depth": n / (TRIALS - 1)})
        for tokens in (100, 200)
        for n in range(TRIALS)
    ]
    reading = [Item("qasper", (1,), ("a",), 4, "qa-f1") for _ in range(TRIALS)]
    return Questions((*keys, *reading), (((1, 2, 3), (4, 5, 6)),) * TEXTS)


def _outcome(name: str, questions: Questions, found: float, f1: float, shift: float) -> Outcome:
    rng = random.Random(name)
    scores = [
        float(rng.random() < found) if item.metric == "begins" else min(1.0, f1 * rng.random() * 2)
        for item in questions.items
    ]
    first = {1: math.log(0.5), 2: math.log(0.5)}
    second = {1: math.log(0.5 + shift), 2: math.log(0.5 - shift)}
    text = Continued((first, second), (math.log(0.5), math.log(0.5 - shift)), None)
    return Outcome(name, {}, ("",) * len(scores), tuple(scores), (text,) * len(questions.texts))


def test_rows() -> None:
    questions = _questions()
    full = _outcome("full", questions, 0.95, 0.8, 0.0)
    light = _outcome("light", questions, 0.4, 0.8, 0.2)
    rows = {(row.engine, row.task, row.metric): row for row in compare(questions, [full, light], 0.05)}
    assert len(rows) == 9
    row = rows["light", "passkey 200", "begins"]
    mine, theirs = light.scores[TRIALS : 2 * TRIALS], full.scores[TRIALS : 2 * TRIALS]
    assert row.value == sum(mine) / TRIALS and row.full == sum(theirs) / TRIALS
    assert row.ratio == pytest.approx(sum(mine) / sum(theirs))
    assert row.verdict == "worse" and row.notes["sign_test_p"] < 1e-3
    assert row.difference is not None and row.difference.low < row.value - row.full < row.difference.high
    row = rows["light", "qasper", "qa-f1"]
    assert row.interval is not None and row.interval.low < row.value < row.interval.high
    assert row.verdict == "cannot tell" and row.difference is not None
    kl = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    row = rows["light", "text 3 + 2", "KL, nats"]
    assert row.value == pytest.approx(kl / 2) and row.notes["largest_position"] == pytest.approx(kl)
    assert row.notes["probability_seen"] == pytest.approx(1)
    row = rows["light", "text 3 + 2", "perplexity"]
    assert row.value == pytest.approx(1 / math.sqrt(0.5 * 0.3)) and row.full == pytest.approx(2)
    assert row.verdict == "worse"


def test_an_engine_equals_itself() -> None:
    questions = _questions()
    full = _outcome("full", questions, 0.9, 0.8, 0.1)
    for row in compare(questions, [full, replace(full, name="same")], 0.1):
        if row.engine == "same" and row.metric != "KL, nats":
            assert row.ratio == 1 and row.verdict == "no worse"
        elif row.engine == "same":
            assert row.value == 0


def test_a_small_sample_says_so() -> None:
    questions = replace(_questions(), texts=())
    few = replace(questions, items=questions.items[:6])
    full = _outcome("full", few, 1.0, 1, 0)
    light = replace(full, name="light", scores=(*full.scores[:5], 0.0))
    (row,) = (row for row in compare(few, [full, light], 0.05) if row.engine == "light")
    assert row.verdict == "cannot tell" and row.notes["items_needed"] > 100
    graded = tuple(replace(item, metric="qa-f1") for item in few.items)
    for scores, told in (([0.5] * 6, "cannot tell"), ([1.0] * 6, "cannot tell")):
        same = replace(full, scores=tuple(scores))
        rows = compare(Questions(graded), [same, replace(same, name="light")], 0.05)
        assert rows[1].verdict == told
    assert f"cannot tell: needs about {row.notes['items_needed']} items" in table([row])


def test_table_and_json(tmp_path: Path) -> None:
    questions = _questions()
    outcomes = [_outcome("full", questions, 0.9, 0.8, 0), _outcome("light", questions, 0.9, 0.8, 0.2)]
    rows = compare(questions, outcomes, 0.05)
    lines = table(rows).splitlines()
    assert len(lines) == len(rows) + 1
    assert (
        len(
            {
                line.index("metric") if n == 0 else line.index(rows[n - 1].metric)
                for n, line in enumerate(lines)
            }
        )
        == 1
    )
    data = json.loads(json.dumps(as_dict({"seed": 0}, questions, outcomes, rows)))
    assert len(data["items"]) == len(questions.items)
    assert data["items"][3]["scores"] == {"full": outcomes[0].scores[3], "light": outcomes[1].scores[3]}
    (path,) = depth_heatmaps(questions, outcomes, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_engines_that_saw_different_positions() -> None:
    questions = _questions()
    full = _outcome("full", questions, 1, 1, 0)
    short = replace(full.continued[0], tops=full.continued[0].tops[:1])
    with pytest.raises(LightTransferError, match="light: 2 and 1 positions cannot be compared"):
        divergences(full, replace(full, name="light", continued=(short,) * TEXTS))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments --endpoint --engine --engines --shares is required"),
        (["--endpoint", "a=http://x", "--engine", "b"], "not allowed with argument"),
        (["--endpoint", "localhost:30000"], "--endpoint localhost:30000: write NAME=http://host:port"),
        (["--engine", "full", "--tasks", "needle"], "'needle' is not one of passkey, 3-key, niah_single_1"),
        (["--engine", "full", "--lengths", "4k"], "argument --lengths: '4k' is not an integer from 1"),
        (["--engine", "full", "--margin", "5"], "argument --margin: '5' is not a share between 0 and 1"),
        (["--engine", "full", "--longbench-tasks", "vcsum"], "'vcsum' is not one of narrativeqa"),
        (["--engine", "full", "--engine", "b"], "--tokenizer: missing"),
        (["--endpoint", "a=http://x", "--endpoint", "b=http://y"], "--tokenizer: missing"),
        (["--endpoint", "a=http://x"], "--endpoint a: nothing to compare it with"),
        (["--engine", "full"], "--engine full: nothing to compare it with"),
        (["--engine", "a/b", "--model-path", "m"], "--engine 'a/b': a name has letters, digits"),
        (["--engine", "a", "--engine", "a", "--model-path", "m"], "--engine a: named twice"),
        (
            ["--engine", "a", "--engine", "b", "--model-path", "m", "--tasks", "facts"],
            "--tasks facts: not of --suite prompts; one of passkey",
        ),
        (["--engine", "a", "--engine", "b", "--model-path", "m", "--cold", "b"], "--cold: only with --suite"),
        (
            [*TURNS, "--tasks", "passkey"],
            "--tasks passkey: not of --suite conversations; one of facts, vague",
        ),
        ([*TURNS, "--gsm8k", "f"], "--gsm8k: only with --suite prompts"),
        ([*TURNS, "--cold", "c"], "--cold c: names no engine; one of a, b"),
        ([*TURNS, "--limit-s", "0"], "argument --limit-s: '0' is not a number above 0"),
        (["--engines", "/nowhere", "--model-path", "m"], "--engines /nowhere: cannot be read"),
    ],
)
def test_bad_options(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--out", str(tmp_path), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
