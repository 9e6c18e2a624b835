"""The text that questions are hidden in. Everything is generated or local; nothing is downloaded."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import Tokenizer

# RULER's noise (scripts/data/synthetic/niah.py), after the passkey task of arXiv 2305.16300.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCES = (
    "The harbour was quiet before the boats came back.",
    "She counted the coins twice and put them in the blue box.",
    "Nobody in the village remembered who had planted the oak.",
    "At noon the train to the mountains left four minutes late.",
    "A letter from the bank lay unopened on the kitchen table.",
    "He repaired the clock with a spring from an old radio.",
    "Rain fell on the vineyards until the end of September.",
    "The teacher drew a map of the river on the blackboard.",
)
SENTENCES_AT_ONCE = 16


def sentences(tokenizer: Tokenizer, tokens: int, rng: random.Random) -> list[int]:
    """``tokens`` token ids of sentences in random order: no two prompts begin alike."""
    ids: list[int] = []
    while len(ids) < tokens:
        text = " ".join(rng.choice(SENTENCES) for _ in range(SENTENCES_AT_ONCE))
        ids += tokenizer.encode(f" {text} ")
    return ids[:tokens]


def split_sentences(text: str) -> list[str]:
    """The sentences of ``text``, whitespace collapsed."""
    flat = " ".join(text.split())
    return [part for part in re.split(r"(?<=[.!?])\s+", flat) if part]


def documentation() -> str:
    """English prose that every Python has: the language reference (pydoc's topics), in a fixed order.

    Its wording changes a little between versions of Python.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Prose:
    """Running text to cut passages from, as token ids."""

    ids: tuple[int, ...]
    source: str

    @classmethod
    def load(cls, tokenizer: Tokenizer, path: str | None) -> Prose:
        """The text of a file, or of Python's documentation; raises LightTransferError."""
        if path is None:
            return cls(tuple(tokenizer.encode(documentation())), "Python's language reference (pydoc topics)")
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LightTransferError(f"--text {path}: cannot be read as UTF-8 text ({error})") from None
        if not text.strip():
            raise LightTransferError(f"--text {path}: holds no text")
        return cls(tuple(tokenizer.encode(text)), path)

    def passage(self, tokens: int, rng: random.Random) -> list[int]:
        """``tokens`` consecutive ids from a random place; raises LightTransferError if there are too few."""
        if len(self.ids) < tokens:
            raise LightTransferError(
                f"--text: {self.source} has {len(self.ids)} tokens, the task needs {tokens} in a row"
            )
        start = rng.randrange(len(self.ids) - tokens + 1)
        return list(self.ids[start : start + tokens])

    def passages(self, count: int, tokens: int, rng: random.Random) -> Iterator[list[int]]:
        """``count`` passages that do not overlap where the text is long enough for that."""
        places = len(self.ids) // tokens
        if places < count:
            for _ in range(count):
                yield self.passage(tokens, rng)
            return
        for place in sorted(rng.sample(range(places), count)):
            yield list(self.ids[place * tokens : (place + 1) * tokens])
