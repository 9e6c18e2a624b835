"""RULER's needle tasks (arXiv 2404.06654; NVIDIA/RULER, scripts/data/synthetic/niah.py).

Template, needle and sizes are the published ones. Three things differ, as nothing is downloaded: essays are a
local text (``--text``, Python's language reference by default), words are drawn from lists here, and
the haystack is filled line by line up to the length asked for.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import Item, Tokenizer, rng_of
from lt_sglang.eval.tasks.haystack import NOISE, Prose, split_sentences

BENCHMARK = "RULER"
NEW_TOKENS = 128
DEPTHS = 40
LINE_WORDS = 16
ADJECTIVES = (
    *("ancient", "bitter", "calm", "clever", "crimson", "distant", "eager", "faint", "gentle"),
    *("golden", "hollow", "humble", "icy", "jolly", "keen", "lively", "mellow", "narrow", "odd"),
    *("pale", "quick", "quiet", "rapid", "rusty", "salty", "sharp", "shiny", "silent", "silver"),
    *("simple", "sleepy", "slim", "smooth", "soft", "solid", "sour", "spare", "steep", "stern"),
    *("strict", "sturdy", "sudden", "sunny", "sweet", "swift", "tall", "tender", "thick", "tidy"),
    *("tiny", "tough", "vague", "vast", "vivid", "warm", "weary", "wide", "wild", "windy", "wise"),
    *("witty", "young", "zesty"),
)
NOUNS = (
    *("anchor", "basket", "candle", "desert", "engine", "feather", "glacier", "hammer", "island"),
    *("jacket", "kettle", "lantern", "mirror", "needle", "orchard", "pepper", "quarry", "ribbon"),
    *("saddle", "tunnel", "valley", "wagon", "window", "barrel", "bridge", "button", "canyon"),
    *("carpet", "castle", "cellar", "circle", "cotton", "cradle", "curtain", "dagger", "drawer"),
    *("fabric", "forest", "fountain", "garage", "garden", "harbor", "helmet", "kitchen", "ladder"),
    *("laundry", "magnet", "meadow", "medal", "metal", "mountain", "napkin", "oven", "paddle"),
    *("parcel", "pencil", "pillow", "pocket", "quilt", "rocket", "shelter", "spoon", "stable"),
    "ticket",
)


@dataclass(frozen=True)
class Shape:
    """One of RULER's needle tasks.

    haystack: "noise", "essay" or "needle" (made of needles). keys, values: "words", "numbers" or "uuids".
    num_keys, num_values, num_queries: needles are num_keys x num_values; num_queries keys are asked for.
    """

    haystack: str
    keys: str
    values: str
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


SHAPES = {
    "niah_single_1": Shape("noise", "words", "numbers"),
    "niah_single_2": Shape("essay", "words", "numbers"),
    "niah_single_3": Shape("essay", "words", "uuids"),
    "niah_multikey_1": Shape("essay", "words", "numbers", num_keys=4),
    "niah_multikey_2": Shape("needle", "words", "numbers"),
    "niah_multikey_3": Shape("needle", "uuids", "uuids"),
    "niah_multivalue": Shape("essay", "words", "numbers", num_values=4),
    "niah_multiquery": Shape("essay", "words", "numbers", num_keys=4, num_queries=4),
}


def too_few(tokens: int, task: str) -> LightTransferError:
    """What is said of prompts that are too short for a task."""
    return LightTransferError(f"lengths: {tokens} tokens are too few for {task}")


@dataclass(frozen=True)
class NiahTask:
    """``trials`` prompts of at most ``tokens`` tokens; room for the answer is not included."""

    name: str
    tokens: int
    trials: int
    prose: Prose | None = None
    seed: int = 0

    def items(self, tokenizer: Tokenizer) -> list[Item]:
        """The prompts; raises LightTransferError if they are too short, or for an essay without text."""
        return [self._item(tokenizer, number) for number in range(self.trials)]

    def _item(self, tokenizer: Tokenizer, number: int) -> Item:
        shape = SHAPES[self.name]
        rng = rng_of(self.seed, self.name, self.tokens, number)
        names = _distinct(rng, shape.keys)
        keys = [next(names) for _ in range(max(shape.num_keys, shape.num_queries))]
        values = [[_draw(rng, shape.values) for _ in range(shape.num_values)] for _ in keys]
        needles = [
            _needle(shape, key, value) for key, some in zip(keys, values, strict=True) for value in some
        ]
        rng.shuffle(needles)
        asked = rng.sample(range(len(keys)), shape.num_queries)
        before, after = _question(shape, [keys[index] for index in asked])
        head, tail = tokenizer.encode(before), tokenizer.encode(after)
        room = self.tokens - len(tokenizer.prefix) - len(head) - len(tail)
        if room < sum(len(tokenizer.encode(f" {needle}")) for needle in needles):
            raise too_few(self.tokens, self.name)
        straw = self._straw(tokenizer, shape, names, rng)
        context = self._context(tokenizer, needles, straw, room, rng)
        return Item(
            task=self.name,
            prompt=(*tokenizer.prefix, *head, *context, *tail),
            answers=tuple(value for index in asked for value in values[index]),
            new_tokens=NEW_TOKENS,
            metric="contains-all",
            cell={"tokens": self.tokens},
            benchmark=BENCHMARK,
        )

    def _context(
        self,
        tokenizer: Tokenizer,
        needles: list[str],
        straw: Iterator[str],
        room: int,
        rng: random.Random,
    ) -> list[int]:
        """Needles at random ones of RULER's 40 depths, between lines of straw."""
        depths = sorted(rng.sample(range(DEPTHS), min(len(needles), DEPTHS)))
        hidden = [tokenizer.encode(f" {needle}") for needle in needles]
        space = room - sum(map(len, hidden))
        lines: list[list[int]] = []
        for text in straw:
            line = tokenizer.encode(f" {text}")
            if len(line) > space:
                break
            lines.append(line)
            space -= len(line)
        for depth, needle in sorted(zip(depths, hidden, strict=True), reverse=True):
            lines.insert(round(len(lines) * depth / (DEPTHS - 1)), needle)
        return [token for line in lines for token in line]

    def _straw(
        self, tokenizer: Tokenizer, shape: Shape, names: Iterator[str], rng: random.Random
    ) -> Iterator[str]:
        """Lines without end; an essay begins anew, somewhere else, where it ends."""
        while shape.haystack == "noise":
            yield NOISE
        while shape.haystack == "needle":
            yield _needle(shape, next(names), _draw(rng, shape.values))
        if self.prose is None:
            raise LightTransferError(f"--text: {self.name} needs running text")
        while True:
            text = tokenizer.decode(self.prose.passage(min(len(self.prose.ids), self.tokens), rng))
            for line in split_sentences(text):
                words = line.split()
                # What is no sentence (a table, a listing) comes in pieces.
                for start in range(0, len(words), LINE_WORDS):
                    yield " ".join(words[start : start + LINE_WORDS])


def _distinct(rng: random.Random, kind: str) -> Iterator[str]:
    """Keys, none twice: a key of two needles would have two answers. Raises LightTransferError at the end."""
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    rng.shuffle(pairs)
    seen: set[str] = set()
    while True:
        if kind == "words" and not pairs:
            raise LightTransferError("lengths: too many needles, there are no more words for their keys")
        key = pairs.pop() if kind == "words" else _draw(rng, kind)
        if key not in seen:
            seen.add(key)
            yield key


def _draw(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def _needle(shape: Shape, key: str, value: str) -> str:
    return f"One of the special magic {shape.values} for {key} is: {value}."


def _question(shape: Shape, keys: list[str]) -> tuple[str, str]:
    """The template's two halves, in the singular for one value (as RULER does)."""
    kind, query = shape.values, ", ".join(keys[:-1]) + ", and " * (len(keys) > 1) + keys[-1]
    one = shape.num_queries * shape.num_values == 1
    some, what, are = ("A", kind.removesuffix("s"), "is") if one else ("Some", kind, "are")
    before = (
        f"{some} special magic {what} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {what} afterwards.\n"
    )
    after = (
        f"\nWhat {are}{'' if one else ' all'} the special magic {what} for {query} mentioned in the provided "
        f"text? The special magic {what} for {query} mentioned in the provided text {are}"
    )
    return before, after
