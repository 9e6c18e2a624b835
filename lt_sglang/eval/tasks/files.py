"""Benchmarks from local files in their published format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import Item, Tokenizer

# LongBench's eval.py: task -> metric. Its Chinese tasks need jieba and are left out.
LONGBENCH: dict[str, str] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), "qa-f1"),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), "rouge-l"),
    "trec": "classification",
    "triviaqa": "qa-f1",
    "passage_retrieval_en": "retrieval",
    "passage_count": "count",
    **dict.fromkeys(("lcc", "repobench-p"), "code-similarity"),
}
FIRST_LINE = ("trec", "triviaqa", "samsum")
# No chat template around these (LongBench's pred.py).
PLAIN = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")

MATH_METRICS = {"gsm8k": "gsm8k", "math500": "math", "aime": "aime"}
MATH_PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def longbench(
    folder: str, names: list[str], count: int | None, max_tokens: int, tokenizer: Tokenizer, chat: bool
) -> list[Item]:
    """The first ``count`` questions of each task of a local LongBench copy.

    Read are ``config/dataset2prompt.json``, ``config/dataset2maxlen.json`` and ``data/NAME.jsonl``. Prompts
    of more than ``max_tokens`` tokens lose their middle, as in LongBench. Raises LightTransferError.
    """
    root = Path(folder).expanduser()
    prompts = _json(root / "config" / "dataset2prompt.json", "--longbench")
    lengths = _json(root / "config" / "dataset2maxlen.json", "--longbench")
    items = []
    for name in names:
        if name not in LONGBENCH:
            raise LightTransferError(f"--longbench-tasks: {name!r} is not one of {', '.join(LONGBENCH)}")
        for record in records(root / "data" / f"{name}.jsonl", "--longbench", count):
            _need(record, ("input", "context", "answers"), f"{name}.jsonl")
            text = prompts[name].format(**record)
            ids = tokenizer.encode(text)
            if len(ids) > max_tokens:
                half = max_tokens // 2
                text = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
            wrap = chat and name not in PLAIN
            prompt = tokenizer.chat(text) if wrap else [*tokenizer.prefix, *tokenizer.encode(text)]
            details = {"all_classes": record.get("all_classes"), "first_line": name in FIRST_LINE}
            items.append(
                Item(
                    name, tuple(prompt), tuple(record["answers"]), lengths[name], LONGBENCH[name], {}, details
                )
            )
    return items


def mathematics(
    name: str, path: str, count: int | None, new_tokens: int, tokenizer: Tokenizer, chat: bool
) -> list[Item]:
    """The first ``count`` problems of GSM8K, MATH-500 or AIME (JSON lines). Raises LightTransferError."""
    items = []
    for record in records(Path(path).expanduser(), f"--{name}", count):
        lower = {key.lower(): value for key, value in record.items()}
        question = lower.get("question", lower.get("problem"))
        if question is None or "answer" not in lower:
            raise LightTransferError(f"--{name} {path}: a line needs 'question' or 'problem', and 'answer'")
        text = MATH_PROMPT.format(question=question)
        prompt = tokenizer.chat(text) if chat else [*tokenizer.prefix, *tokenizer.encode(f"{text}\n")]
        answer = str(lower["answer"]).rpartition("####")[2].strip()
        items.append(Item(name, tuple(prompt), (answer,), new_tokens, MATH_METRICS[name]))
    return items


def records(path: Path, flag: str, count: int | None = None) -> list[dict[str, Any]]:
    """The first ``count`` objects of a JSON lines file; raises LightTransferError that names the line."""
    found: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if count is not None and len(found) >= count:
                    break
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise LightTransferError(f"{flag} {path}: line {number} is not a JSON object")
                found.append(record)
    except (OSError, UnicodeDecodeError) as error:
        raise LightTransferError(f"{flag} {path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise LightTransferError(f"{flag} {path}: line {number} is not valid JSON ({error})") from None
    if not found:
        raise LightTransferError(f"{flag} {path}: holds no record")
    return found


def _json(path: Path, flag: str) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LightTransferError(f"{flag}: {path} cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise LightTransferError(f"{flag}: {path} is not a JSON object")
    return data


def _need(record: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if key not in record]
    if missing:
        raise LightTransferError(f"--longbench: {where} has a line without {missing[0]!r}")
