"""LongBench (arXiv 2308.14508) and LongBench v2 (arXiv 2412.15204), from local files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import Item
from lt_sglang.eval.tasks.files import Reading, read, whole
from lt_sglang.launch.ready import say

NAME, NAME_2 = "LongBench", "LongBench v2"
# LongBench's eval.py: task -> metric. Its other Chinese tasks are left out.
LONGBENCH: dict[str, str] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en"), "qa-f1"),
    "multifieldqa_zh": "qa-f1-zh",
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), "qa-f1"),
    "dureader": "rouge-l-zh",
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), "rouge-l"),
    "trec": "classification",
    "triviaqa": "qa-f1",
    "passage_retrieval_en": "retrieval",
    "passage_count": "count",
    **dict.fromkeys(("lcc", "repobench-p"), "code-similarity"),
}
# The 16 tasks of table 2 of arXiv 2410.13846.
OF_THE_PAPER = tuple(name for name in LONGBENCH if name not in ("multifieldqa_zh", "2wikimqa"))
FIRST_LINE = ("trec", "triviaqa", "samsum")
# No chat template around these (LongBench's pred.py).
PLAIN = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")

LENGTHS = ("short", "medium", "long")
CHOICES = ("A", "B", "C", "D")
CHOICE_TOKENS = 128
CHOICE_PROMPT = (
    "Read the text below, then answer the question about it.\n\n<text>\n{context}\n</text>\n\n"
    "Question: {question}\n{choices}\n\n"
    'Which choice is right? Answer in this form: "The correct answer is (A)", with its letter.'
)


def longbench(folder: str, reading: Reading, names: Sequence[str] = ()) -> list[Item]:
    """The questions of a local copy of LongBench: of ``names``, or of every task that is there.

    Read are ``config/dataset2prompt.json``, ``config/dataset2maxlen.json`` and ``data/NAME.jsonl``. Prompts
    that are too long lose their middle, as in LongBench. Raises LightTransferError.
    """
    root = Path(folder).expanduser()
    prompts = whole(root / "config" / "dataset2prompt.json", "--longbench")
    lengths = whole(root / "config" / "dataset2maxlen.json", "--longbench")
    found = [name for name in LONGBENCH if (root / "data" / f"{name}.jsonl").exists()]
    if not names and not found:
        raise LightTransferError(f"--longbench {root}: has no data/NAME.jsonl of {', '.join(LONGBENCH)}")
    if not names and len(found) < len(LONGBENCH):
        say(f"--longbench: not there: {', '.join(name for name in LONGBENCH if name not in found)}")
    items = []
    for name in names or found:
        if name not in LONGBENCH:
            raise LightTransferError(f"--longbench-tasks: {name!r} is not one of {', '.join(LONGBENCH)}")
        template, new_tokens = prompts.get(name, str), lengths.get(name, int)
        for record in read(root / "data" / f"{name}.jsonl", "--longbench", reading.count):
            given = {"input": record.get("input", str), "context": record.get("context", str)}
            classes = record.get("all_classes", list) if name == "trec" else None
            prompt = reading.prompt(reading.shortened(_filled(template, given)), plain=name in PLAIN)
            details = {"all_classes": classes, "first_line": name in FIRST_LINE}
            answers = tuple(record.texts("answers"))
            items.append(Item(name, prompt, answers, new_tokens, LONGBENCH[name], {}, details, NAME))
    return items


def _filled(template: str, given: Mapping[str, str]) -> str:
    """The template with its fields; braces in what they hold stay."""
    return re.sub(r"\{(input|context)\}", lambda field: given[field[1]], template)


def longbench_v2(path: str, reading: Reading) -> list[Item]:
    """The questions of LongBench v2's data.json, with four choices each; a row for each ``length``."""
    items = []
    for record in read(path, "--longbench-v2", reading.count):
        choices = [f"({letter}) {record.get(f'choice_{letter}', str).strip()}" for letter in CHOICES]
        text = CHOICE_PROMPT.format(
            context=record.get("context", str).strip(),
            question=record.get("question", str).strip(),
            choices="\n".join(choices),
        )
        prompt = reading.prompt(reading.shortened(text))
        task, answer = record.get("length", str, LENGTHS), record.get("answer", str, CHOICES)
        items.append(Item(task, prompt, (answer,), CHOICE_TOKENS, "choice", benchmark=NAME_2))
    return items
