"""Training samples from local JSON lines: what a line may hold, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lt_sglang.errors import LightTransferError

# Of RUC-AIBOX/long_form_thought_data_5k: a thought, then a solution.
THOUGHT_MARKS = ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>")
# Prompt and completion under other names, as lt-sglang calibrate reads them.
PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "response"), ("input", "output"))
FORMATS = ("long-form thought", "chat messages", "prompt and completion", "text")
KNOWN = "question + combined_text, messages, prompt + completion (or question + answer), or text"
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """One line of a file. where: file and line, for messages. kind: one of FORMATS.

    messages: a conversation whose assistant turns are answers; for a prompt and its completion one turn each.
    text: of plain text, None else. domain: as the file names it.
    """

    where: str
    kind: str
    messages: tuple[dict[str, str], ...] = ()
    text: str | None = None
    domain: str | None = None


def read_records(paths: Sequence[Path]) -> Iterator[Record]:
    """The lines of the files, in order. Raises LightTransferError that names file and line."""
    for path in paths:
        found = False
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        found = True
                        yield parse_line(line, f"{path}, line {number}")
        except (OSError, UnicodeDecodeError) as error:
            raise LightTransferError(f"--data {path}: cannot be read ({error})") from None
        if not found:
            raise LightTransferError(f"--data {path}: holds no sample")


def parse_line(line: str, where: str) -> Record:
    """One sample; raises LightTransferError that begins with ``where``."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise LightTransferError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise LightTransferError(f"{where}: not a JSON object")
    if "messages" in value:
        return Record(where, FORMATS[1], _conversation(value["messages"], where))
    if "combined_text" in value:
        question, answer = (_text(value, name, where) for name in ("question", "combined_text"))
        for mark in THOUGHT_MARKS:
            if mark not in answer:
                raise LightTransferError(f"{where}: combined_text has no {mark}")
        domain = value.get("domain")
        return Record(
            where, FORMATS[0], _turns(question, answer), domain=None if domain is None else str(domain)
        )
    for names in PAIRS:
        if all(name in value for name in names):
            prompt, completion = (_text(value, name, where) for name in names)
            return Record(where, FORMATS[2], _turns(prompt, completion))
    if "text" in value:
        return Record(where, FORMATS[3], text=_text(value, "text", where))
    raise LightTransferError(f"{where}: has {', '.join(value) or 'no key'}; a sample has {KNOWN}")


def sha256_of(paths: Sequence[Path]) -> str:
    """SHA-256 of all files' bytes, one file after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _turns(question: str, answer: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


def _conversation(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise LightTransferError(f"{where}: messages is not a list of messages")
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise LightTransferError(f"{where}: {name} needs a role and a content that is text")
        if message.get("role") not in ROLES:
            raise LightTransferError(
                f"{where}: {name}.role is {message.get('role')!r}, not one of {', '.join(ROLES)}"
            )
        if message["role"] == "assistant" and not message["content"].strip():
            raise LightTransferError(f"{where}: the answer ({name}) is empty")
    if all(message["role"] != "assistant" for message in messages):
        raise LightTransferError(f"{where}: messages has no answer, a message with the role assistant")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _text(value: dict[str, Any], name: str, where: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise LightTransferError(f"{where}: {name} is {'missing' if text is None else 'not text'}")
    answer = name in ("combined_text", "text", *(pair[1] for pair in PAIRS))
    if answer and not text.strip():
        raise LightTransferError(
            f"{where}: {name} is empty" if name == "text" else f"{where}: the answer ({name}) is empty"
        )
    return text
