"""Suites of ``lt-sglang eval``: arms by shares, tasks and files, and the tables that come out."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from lt_sglang.cli import eval as command
from lt_sglang.cli import main
from lt_sglang.cli.eval_arms import arms
from lt_sglang.cli.eval_suites import FILES, RULER, SUITES, TASKS
from lt_sglang.config import CONFIG_KEY
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.evaluate import Outcome, Questions, compare
from lt_sglang.eval.intervals import paired_means
from lt_sglang.eval.items import Item
from lt_sglang.eval.report import markdown, table

from .test_quality_files import CHOICE, FOLLOW, LINE, MEMORY, folder, lines
from .test_quality_ruler import _squad
from .words import Words

# ---- engines


def _calibrated(path: Path, **evidence: Any) -> str:
    path.write_text(
        json.dumps({CONFIG_KEY: {"lazy_layers": [0], "recent_tokens": 252, "_calibration": evidence}})
    )
    return str(path)


def test_arms_of_shares(tmp_path: Path) -> None:
    greedy = _calibrated(tmp_path / "greedy.json", order=[3, 0, 2])
    counted = _calibrated(
        tmp_path / "c.json", lazy_in_samples=[9, 0, 4, 4], mean_laziness=[0.5, 0.1, 0.2, 0.3]
    )
    flags = ["--tp-size", "2", "--lt-sink-tokens", "8", "--lt-score", "error-mass"]
    found, rest = arms((0.25, 0.5), greedy, flags)
    assert rest == ["--tp-size", "2"]
    windows = "--lt-sink-tokens=8 --lt-recent-tokens=252"  # the file has 252
    assert found == [
        "full",
        f"static-25=--lt-lazy-layers=3 --lt-mode=static {windows}",
        f"dynamic-25=--lt-mode=dynamic {windows} --lt-keep=0.75 --lt-score=error-mass",
        f"static-50=--lt-lazy-layers=0,3 --lt-mode=static {windows}",
        f"dynamic-50=--lt-mode=dynamic {windows} --lt-keep=0.5 --lt-score=error-mass",
    ]
    assert [arms((share,), counted, [])[0][1].split("=")[2].split()[0] for share in (0.25, 0.5, 0.75)] == [
        "0",
        "0,3",
        "0,2-3",
    ]
    assert arms((0.3,), "ends", [])[0][1:] == [
        "static-30=--lt-lazy-layers=ends:0.3 --lt-mode=static",
        "dynamic-30=--lt-mode=dynamic --lt-keep=0.7",
    ]
    assert arms((0.5,), None, [])[0] == ["full", "dynamic-50=--lt-mode=dynamic --lt-keep=0.5"]


def test_arms_that_cannot_be(tmp_path: Path) -> None:
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps({CONFIG_KEY: {"lazy_layers": [0]}}))
    greedy = _calibrated(tmp_path / "greedy.json", order=[3, 0, 2])
    for shares, static, flags, message in (
        (
            (0.5,),
            None,
            ["--lt-keep", "0.5"],
            "--lt-keep: --shares decides it; name such an engine with --engine",
        ),
        ((0.5,), str(plain), [], "has no counts of lt-sglang calibrate"),
        (
            (0.5,),
            "half",
            [],
            r"--static half: is neither a file that can be read .* nor one of ends, random, pyramid",
        ),
        ((0.05,), greedy, [], r"--shares 0.05: of 4 layers that is 0; 1 to 3"),
    ):
        with pytest.raises(LightTransferError, match=message):
            arms(shares, static, flags)


# ---- rows and tables


def _answered(name: str, scores: Sequence[float]) -> Outcome:
    return Outcome(name, {}, ("",) * len(scores), tuple(scores), ())


def test_all_tasks_of_a_benchmark() -> None:
    """RULER's figure is the mean over tasks, LongMemEval's over questions; one task alone has none."""
    items = [
        *(Item("vt", (n,), ("a",), 1, "contains-all", {"tokens": 9}, benchmark="RULER") for n in range(30)),
        *(Item("cwe", (n,), ("a",), 1, "contains-all", {"tokens": 9}, benchmark="RULER") for n in range(20)),
        *(Item("multi-session", (n,), ("a",), 1, "recall", benchmark="LongMemEval") for n in range(30)),
        *(Item("knowledge-update", (n,), ("a",), 1, "recall", benchmark="LongMemEval") for n in range(10)),
        *(Item("ifeval", (n,), ("a",), 1, "ifeval", benchmark="IFEval") for n in range(5)),
        *(Item("passkey", (n,), ("a",), 1, "begins") for n in range(5)),
    ]
    full = _answered("full", [0.5] * 30 + [1.0] * 20 + [0.5] * 30 + [1.0] * 10 + [1.0] * 10)
    light = _answered("light", [0.5] * 30 + [0.5] * 20 + [0.5] * 30 + [0.5] * 10 + [1.0] * 10)
    rows = compare(Questions(tuple(items)), [full, light], 0.05)
    every = {(row.engine, row.benchmark): row for row in rows if row.task.startswith("all tasks")}
    assert {benchmark for _, benchmark in every} == {"RULER", "LongMemEval"}
    ruler, memory = every["light", "RULER"], every["light", "LongMemEval"]
    assert (ruler.task, ruler.metric, ruler.items) == ("all tasks 9", "mean of tasks", 50)
    assert (ruler.full, ruler.value, ruler.verdict) == (0.75, 0.5, "worse")
    assert (memory.task, memory.metric, memory.full, memory.value) == ("all tasks", "recall", 0.625, 0.5)
    few = Questions(tuple(items[:49]))
    rows_of_few = compare(
        few, [_answered("full", full.scores[:49]), _answered("light", light.scores[:49])], 0.05
    )
    assert (rows_of_few[-1].task, rows_of_few[-1].verdict) == ("all tasks 9", "cannot tell"), (
        "19 of cwe are too few"
    )
    text = table(rows)
    assert [line for line in text.splitlines() if line in ("RULER", "LongMemEval", "IFEval")] == [
        "RULER",
        "LongMemEval",
        "IFEval",
    ]
    shown = markdown(rows)
    assert "**RULER**\n\n| task | metric | items | full | light |\n| --- | --- | --- | --- | --- |\n" in shown
    assert "| all tasks 9 | mean of tasks | 50 | 0.750 (0.750 to 0.750) | 0.500 (-0.250 to -0.250) |" in shown
    assert "| passkey | begins | 5 | 1.000 (0.566 to 1.000) | 1.000 (-0.434 to +0.434) |" in shown


def test_interval_of_a_mean_over_tasks() -> None:
    """Against the normal approximation, whose variance is known for strata."""
    rng = random.Random(0)
    strata = ["a"] * 200 + ["b"] * 50
    first = [rng.random() for _ in strata]
    second = [
        value + rng.gauss(0.1 if of == "a" else 0.3, 0.2) for value, of in zip(first, strata, strict=True)
    ]
    found = paired_means(first, second, strata)
    parts = [
        numpy.array([two - one for one, two, of in zip(first, second, strata, strict=True) if of == name])
        for name in "ab"
    ]
    centre = sum(part.mean() for part in parts) / 2
    half = 1.96 * sum(part.var() / len(part) for part in parts) ** 0.5 / 2
    assert found.low == pytest.approx(centre - half, abs=0.15 * half)
    assert found.high == pytest.approx(centre + half, abs=0.15 * half)
    assert paired_means(first, second, ["a"] * len(first)) == paired_means(first, second)


# ---- the command


class Knows:
    """A server that knows all answers but those of questions whose accepted answers are ``misses``."""

    asked: tuple[Item, ...] = ()

    def __init__(self, name: str, url: str, clients: int) -> None:
        self.name = name

    def info(self) -> dict[str, Any]:
        return {}

    def answers(self, prompts: Sequence[Any], progress: Any) -> list[list[int]]:
        told = []
        for item in Knows.asked:
            right = {
                "choice": f"The correct answer is ({item.answers[0]})",
                "ifeval": "two words",
                "contains-all": " ".join(item.answers),
                "math": f"\\boxed{{{item.answers[0]}}}",
            }
            text = right.get(item.metric, item.answers[0])
            told.append(
                TOKENIZER.encode("" if self.name == "poor" and item.task in ("vt", "short") else text)
            )
        assert [prompt for prompt, _ in prompts] == [item.prompt for item in Knows.asked]
        return told

    def continued(self, texts: Sequence[Any], top: int, progress: Any) -> list[Any]:
        return []


TOKENIZER = Words()
TWO = ["--endpoint", "full=http://a", "--endpoint", "poor=http://b", "--tokenizer", "m", "--no-plots"]


def _run(monkeypatch: pytest.MonkeyPatch, out: Path, *argv: str) -> dict[str, Any]:
    def questions(args: Any, tokenizer: Words) -> Questions:
        found = built(args, tokenizer)
        Knows.asked = found.items
        return found

    built = command.build_questions
    monkeypatch.setattr(command, "build_questions", questions)
    monkeypatch.setattr(command, "Endpoint", Knows)
    monkeypatch.setattr(command, "HfTokenizer", lambda *_: TOKENIZER)
    assert main(["eval", *TWO, "--out", str(out), *argv]) == 0
    monkeypatch.undo()
    rows = json.loads((out / "report.json").read_text())["rows"]
    return {(row["engine"], row["benchmark"], row["task"]): row for row in rows}


def test_suite_ruler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    squad = _squad(tmp_path / "squad.json", 2)
    rows = _run(
        monkeypatch, tmp_path, "--suite", "ruler", "--squad", squad, "--lengths", "900", "--trials", "2"
    )
    tasks = [task for engine, _, task in rows if engine == "full"]
    assert tasks == [f"{name} 900" for name in RULER if name != "qa_2"] + ["all tasks 900"]
    told = capsys.readouterr()
    assert "--suite ruler: left out, as not given: --hotpotqa" in told.err
    assert rows["full", "RULER", "all tasks 900"]["value"] == 1
    assert rows["poor", "RULER", "vt 900"]["value"] == 0 and rows["poor", "RULER", "qa_1 900"]["value"] == 1
    assert rows["poor", "RULER", "all tasks 900"]["value"] == pytest.approx(11 / 12)
    assert told.out.startswith("RULER\nengine") and (tmp_path / "table.md").read_text().startswith(
        "**RULER**"
    )


def test_suites_of_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    classes = {**LINE, "all_classes": ["Ann"]}
    problem = lines(tmp_path / "p.jsonl", {"problem": "?", "answer": "#### 3"})
    for suite, flags, expected in (
        (
            "longbench",
            ["--longbench", folder(tmp_path, qasper=[LINE], trec=[classes])],
            {"qasper", "trec", "all tasks"},
        ),
        (
            "longbench-v2",
            ["--longbench-v2", lines(tmp_path / "v2", CHOICE, {**CHOICE, "length": "long"})],
            {"short", "long", "all tasks"},
        ),
        ("longmemeval", ["--longmemeval", lines(tmp_path / "m", MEMORY)], {"multi-session"}),
        ("ifeval", ["--ifeval", lines(tmp_path / "i", FOLLOW)], {"ifeval"}),
        ("math", ["--gsm8k", problem, "--aime", problem], {"gsm8k", "aime", "all tasks"}),
    ):
        rows = _run(monkeypatch, tmp_path / suite, "--suite", suite, *flags)
        assert {task for _, _, task in rows} == expected
        assert all(row["value"] == 1 for (engine, *_), row in rows.items() if engine == "full")
    assert rows["full", "Mathematics", "aime"]["items"] == 1


def test_suite_paper_asks_the_papers_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = folder(tmp_path, qasper=[LINE], musique=[LINE])
    named = ["--longbench", path, "--longbench-tasks", "qasper", "--tasks", "niah_single_1,niah_multikey_1"]
    rows = _run(
        monkeypatch, tmp_path / "out", "--suite", "paper", *named, "--lengths", "700", "--trials", "1"
    )
    assert {benchmark for _, benchmark, _ in rows} == {"RULER", "LongBench"}
    assert SUITES["paper"].tasks[-1] == "text" and set(SUITES["paper"].tasks) <= set(TASKS)


def test_every_file_has_a_suite() -> None:
    for name in FILES:
        assert any(name in suite.files for other, suite in SUITES.items() if other != "prompts")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "longbench"], "--suite longbench: needs --longbench FOLDER"),
        (
            ["--suite", "math"],
            "--suite math: needs --gsm8k FILE.jsonl or --math500 FILE.jsonl or --aime FILE.jsonl",
        ),
        (["--suite", "ruler", "--ifeval", "f"], "--ifeval: only with --suite prompts or ifeval"),
        (
            ["--suite", "ruler", "--tasks", "passkey"],
            "--tasks passkey: not of --suite ruler; one of niah_single_1",
        ),
        (["--suite", "ruler", "--tasks", "qa_2"], "--tasks qa_2: needs --hotpotqa FILE"),
        (
            ["--suite", "ifeval", "--ifeval", "f", "--tasks", "vt"],
            "--tasks vt: not of --suite ifeval; it has no tasks",
        ),
        (["--suite", "ifeval", "--ifeval", "/nowhere"], "--ifeval /nowhere: cannot be read"),
        (["--static", "ends"], "--static: only with --shares"),
    ],
)
def test_bad_suites(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "HfTokenizer", lambda *_: TOKENIZER)
    assert main(["eval", *TWO, "--out", str(tmp_path), *argv]) == 2
    assert message in capsys.readouterr().err


def test_shares_are_checked_as_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4})
    )
    argv = ["--model-path", str(model), "--out", str(tmp_path), "--no-plots"]
    assert main(["eval", *argv, "--shares", "0.5,0.5"]) == 2
    assert "--engine dynamic-50: named twice" in capsys.readouterr().err
    assert main(["eval", *argv, "--shares", "0.05"]) == 2
    assert "--engine dynamic-5: --lt-keep: 0.95 of 4 layers is 4" in capsys.readouterr().err
