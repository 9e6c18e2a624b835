"""RULER's needle tasks (arXiv 2404.06654; NVIDIA/RULER, scripts/data/synthetic/niah.py).

Template, needle and sizes are the published ones. Three things differ, as nothing is downloaded: essays are a
local text (``--text``, Python's language reference by default), words are drawn from lists here, and
lengths are exact token counts: the haystack is cut instead of found by search.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass

from lt_sglang.errors import LightTransferError
from lt_sglang.quality.items import Item, Tokenizer, rng_of
from lt_sglang.quality.tasks.haystack import NOISE, Prose, split_sentences

NEW_TOKENS = 128
DEPTHS = 40
ADJECTIVES = (
    *("ancient", "bitter", "calm", "clever", "crimson", "distant", "eager", "faint", "gentle", "golden"),
    *("hollow", "humble", "icy", "jolly", "keen", "lively", "mellow", "narrow", "odd", "pale"),
)
NOUNS = (
    *("anchor", "basket", "candle", "desert", "engine", "feather", "glacier", "hammer", "island", "jacket"),
    *("kettle", "lantern", "mirror", "needle", "orchard", "pepper", "quarry", "ribbon", "saddle", "tunnel"),
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
        keys = [_draw(rng, shape.keys) for _ in range(max(shape.num_keys, shape.num_queries))]
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
            raise LightTransferError(f"lengths: {self.tokens} tokens are too few for {self.name}")
        context = self._context(tokenizer, shape, needles, room, rng)
        return Item(
            task=self.name,
            prompt=(*tokenizer.prefix, *head, *context, *tail),
            answers=tuple(value for index in asked for value in values[index]),
            new_tokens=NEW_TOKENS,
            metric="contains-all",
            cell={"tokens": self.tokens},
        )

    def _context(
        self, tokenizer: Tokenizer, shape: Shape, needles: list[str], room: int, rng: random.Random
    ) -> list[int]:
        """Needles at random ones of RULER's 40 depths, between sentences."""
        depths = sorted(rng.sample(range(DEPTHS), min(len(needles), DEPTHS)))
        hidden = [tokenizer.encode(f" {needle}") for needle in needles]
        space = room - sum(map(len, hidden))
        straw = [tokenizer.encode(f" {line}") for line in self._straw(tokenizer, shape, space, rng)]
        lines: list[list[int]] = []
        for line in straw:
            if len(line) > space:
                break
            lines.append(line)
            space -= len(line)
        for depth, needle in sorted(zip(depths, hidden, strict=True), reverse=True):
            lines.insert(round(len(lines) * depth / (DEPTHS - 1)), needle)
        return [token for line in lines for token in line]

    def _straw(self, tokenizer: Tokenizer, shape: Shape, tokens: int, rng: random.Random) -> list[str]:
        """Lines of at least ``tokens`` tokens."""
        if shape.haystack == "noise":
            return [NOISE] * (tokens // len(tokenizer.encode(f" {NOISE}")) + 1)
        if shape.haystack == "essay":
            if self.prose is None:
                raise LightTransferError(f"--text: {self.name} needs running text")
            return split_sentences(tokenizer.decode(self.prose.passage(tokens, rng)))
        lines: list[str] = []
        left = tokens
        while left > 0:
            line = _needle(shape, _draw(rng, shape.keys), _draw(rng, shape.values))
            left -= len(tokenizer.encode(f" {line}"))
            lines.append(line)
        return lines


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
