"""Local files of published benchmarks: their records, fields that are checked, and prompts made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import Tokenizer

T = TypeVar("T")
KINDS = {str: "text", list: "a list", dict: "an object", int: "a whole number"}


@dataclass(frozen=True)
class Record:
    """One object of a file. where: flag, file and line, as errors name them."""

    where: str
    fields: Mapping[str, Any]

    def get(self, name: str, kind: type[T], allowed: Sequence[T] = ()) -> T:
        """A field's value; raises LightTransferError if it is missing, of another kind or not allowed."""
        if name not in self.fields:
            raise LightTransferError(f"{self.where}: has no {name!r}, only {', '.join(self.fields)}")
        value = self.fields[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise LightTransferError(f"{self.where}: {name}: {_short(value)} is not {KINDS[kind]}")
        if allowed and value not in allowed:
            raise LightTransferError(
                f"{self.where}: {name}: {_short(value)} is not one of {', '.join(map(str, allowed))}"
            )
        return value

    def texts(self, name: str) -> list[str]:
        """A list of text, or a single text, at least one; raises LightTransferError."""
        value = self.fields.get(name)
        found = [value] if isinstance(value, str) else self.get(name, list)
        if not found or not all(isinstance(text, str) for text in found):
            raise LightTransferError(f"{self.where}: {name}: {_short(found)} is not text, nor a list of text")
        return found

    def inner(self, name: str) -> list[Record]:
        """The objects of a list; raises LightTransferError."""
        found = self.get(name, list)
        records = [
            Record(f"{self.where}: {name} {number}", each) for number, each in enumerate(found, start=1)
        ]
        for record in records:
            if not isinstance(record.fields, dict):
                raise LightTransferError(f"{record.where}: {_short(record.fields)} is not an object")
        return records


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


@dataclass(frozen=True)
class Reading:
    """How the questions of files are asked.

    count: of each file; None all. max_tokens: longer prompts are shortened. chat: within the chat template.
    new_tokens: of a problem in mathematics.
    """

    tokenizer: Tokenizer
    count: int | None = None
    max_tokens: int = 8192
    chat: bool = False
    new_tokens: int = 2048

    def shortened(self, text: str) -> str:
        """The text, without its middle if it is too long."""
        ids = self.tokenizer.encode(text)
        if len(ids) <= self.max_tokens:
            return text
        half = self.max_tokens // 2
        return self.tokenizer.decode(ids[:half]) + self.tokenizer.decode(ids[-half:])

    def prompt(self, text: str, plain: bool = False) -> tuple[int, ...]:
        """A text as token ids; ``plain``: never in a chat template."""
        if self.chat and not plain:
            return tuple(self.tokenizer.chat(text))
        return (*self.tokenizer.prefix, *self.tokenizer.encode(text))


def read(path: str | Path, flag: str, count: int | None = None) -> list[Record]:
    """The first ``count`` objects of a file: JSON lines, or a JSON array of objects.

    Raises:
        LightTransferError: it names the file and the line, or the place in the array.
    """
    file = Path(path).expanduser()
    found: list[Record] = []
    for where, value in _values(file, flag):
        if count is not None and len(found) >= count:
            break
        if not isinstance(value, dict):
            raise LightTransferError(f"{where} is not a JSON object")
        found.append(Record(where, value))
    if not found:
        raise LightTransferError(f"{flag} {file}: holds no record")
    return found


def records(path: Path, flag: str, count: int | None = None) -> list[dict[str, Any]]:
    """As ``read``, the objects alone."""
    return [dict(record.fields) for record in read(path, flag, count)]


def whole(path: str | Path, flag: str) -> Record:
    """A file that is one JSON object; raises LightTransferError."""
    file = Path(path).expanduser()
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LightTransferError(f"{flag}: {file} cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise LightTransferError(f"{flag}: {file} is not a JSON object")
    return Record(f"{flag} {file}", data)


def _values(file: Path, flag: str) -> Iterator[tuple[str, Any]]:
    number = 1
    try:
        with file.open(encoding="utf-8") as lines:
            if lines.read(1) == "[":
                lines.seek(0)
                for number, value in enumerate(json.load(lines), start=1):
                    yield f"{flag} {file}: record {number}", value
                return
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{flag} {file}: line {number}", json.loads(line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise LightTransferError(f"{flag} {file}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        place = max(number, error.lineno)
        raise LightTransferError(f"{flag} {file}: line {place} is not valid JSON ({error})") from None
