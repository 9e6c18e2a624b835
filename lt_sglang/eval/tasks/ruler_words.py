"""RULER's tasks about words (arXiv 2404.06654, section 3): variable tracking, common and frequent words.

Sizes are the published ones; prompts have the published parts in words of ours, and the words to count
come from lists here and from running text. Room for the answer is not part of a prompt's length.
"""

from __future__ import annotations

import math
import random
import re
import string
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import Item, Tokenizer, rng_of
from lt_sglang.eval.tasks.haystack import NOISE, Prose
from lt_sglang.eval.tasks.ruler import ADJECTIVES, BENCHMARK, NOUNS, too_few

HOPS = 4
COMMON = 10
SHORT_TOKENS = 4096  # below, common words are repeated less often
EXAMPLE_TOKENS = 500
CODE_LETTERS = 6
TOKENS_A_CODE = 50  # one coded word for so many tokens of the prompt
ZETA_2 = math.pi**2 / 6  # makes the shares 1 / rank**2 a distribution

VT = (
    "Assignments to variables are hidden in the text below. Follow them: you will be asked which variables "
    "hold a value.\n\n{context}\nQuestion: Which variables hold the value {value} in the text above?\n"
    "Answer: By the assignments in the text above, {count} variables hold the value {value}. They are:"
)
CWE = (
    "Below is a numbered list of words, some of which are repeated more often than others. Remember those."
    "\n{context}\nQuestion: Which 10 words are repeated most often in the list above?\n"
    "Answer: The 10 words that are repeated most often are:"
)
FWE = (
    "The text below is made of coded words. Count how often each of them appears; dots are no word.\n"
    "{context}\nQuestion: Which three coded words appear most often in the text above? Name them only.\n"
    "Answer: The three coded words that appear most often are:"
)

Written = tuple[str, tuple[str, ...]]  # a prompt, what its answer must name


def fitted(tokenizer: Tokenizer, tokens: int, write: Callable[[int], str], least: int, most: int) -> int:
    """The number of units of which the text that ``write`` makes has ``tokens`` tokens or hardly fewer.

    It is between ``least`` and ``most``; ``least - 1`` if the text is too long even of ``least``.
    """
    room = tokens - len(tokenizer.prefix)

    def long(units: int) -> bool:
        return len(tokenizer.encode(write(units))) > room

    low, high = least, least
    while high < most and not long(high):
        low, high = high, min(2 * high, most)
    return low + bisect_left(range(low, high + 1), True, key=long) - 1


@dataclass(frozen=True)
class WordsTask:
    """``trials`` prompts of at most ``tokens`` tokens.

    name: one of WORD_TASKS. prose: running text that words are taken from.
    """

    name: str
    tokens: int
    trials: int
    prose: Prose
    seed: int = 0

    def items(self, tokenizer: Tokenizer) -> list[Item]:
        """The prompts; raises LightTransferError if they are too short, or too long for so few words."""
        words = self._words(tokenizer) if self.name == "cwe" else []
        return [self._item(tokenizer, number, words) for number in range(self.trials)]

    def _item(self, tokenizer: Tokenizer, number: int, words: Sequence[str]) -> Item:
        writer, new_tokens, least = WORD_TASKS[self.name]

        def write(units: int) -> Written:
            return writer(rng_of(self.seed, self.name, self.tokens, number), self.tokens, units, words)

        most = len(words) if words else self.tokens
        units = fitted(tokenizer, self.tokens, lambda units: write(units)[0], least, most)
        if units < least:
            raise too_few(self.tokens, self.name)
        if units == most:
            raise LightTransferError(
                f"--text: cwe of {self.tokens} tokens needs more different words than the {most} there are"
            )
        text, answers = write(units)
        prompt = (*tokenizer.prefix, *tokenizer.encode(text))
        cell = {"tokens": self.tokens}
        return Item(self.name, prompt, answers, new_tokens, "contains-all", cell, benchmark=BENCHMARK)

    def _words(self, tokenizer: Tokenizer) -> list[str]:
        text = tokenizer.decode(list(self.prose.ids))
        return sorted({*ADJECTIVES, *NOUNS, *re.findall(r"\b[a-z]{3,}\b", text)})


def _variables(rng: random.Random, tokens: int, units: int, words: Sequence[str]) -> Written:
    """A chain of assignments in noise, after a short example that is solved."""
    example, solved = _chain(rng, 3, min(units, EXAMPLE_TOKENS // 40))
    prompt, answers = _chain(rng, 5, units)
    return f"{example} {' '.join(solved)}\n\n{prompt}", answers


def _chain(rng: random.Random, letters: int, lines: int) -> Written:
    names = _distinct(rng, HOPS + 1, string.ascii_uppercase, letters)
    value = str(rng.randint(10_000, 99_999))
    held = [value, *(f"VAR {name}" for name in names)]
    chain = [f"VAR {name} = {of}" for name, of in zip(names, held, strict=False)]
    text = [NOISE] * lines
    for place, line in sorted(
        zip(sorted(rng.sample(range(lines), len(chain))), chain, strict=True), reverse=True
    ):
        text.insert(place, line)
    return VT.format(context="\n".join(text), value=value, count=len(names)), tuple(names)


def _common(rng: random.Random, tokens: int, units: int, words: Sequence[str]) -> Written:
    """Ten words repeated often among ``units`` different ones, after a short example that is solved."""
    short = tokens < SHORT_TOKENS
    example, solved = _list(rng, words, 20 if short else 40, *((3, 1) if short else (10, 3)))
    prompt, answers = _list(rng, words, units, *((6, 1) if short else (30, 3)))
    told = " ".join(f"{place}. {word}" for place, word in enumerate(solved, start=1))
    return f"{example} {told}\n{prompt}", answers


def _list(rng: random.Random, words: Sequence[str], different: int, often: int, seldom: int) -> Written:
    drawn = rng.sample(words, min(different, len(words)))
    common, others = drawn[:COMMON], drawn[COMMON:]
    listed = common * often + others * seldom
    rng.shuffle(listed)
    context = " ".join(f"{place}. {word}" for place, word in enumerate(listed, start=1))
    return CWE.format(context=context), tuple(common)


def _frequent(rng: random.Random, tokens: int, units: int, words: Sequence[str]) -> Written:
    """``units`` coded words, the word of rank r with a share of 1 / r**2; the first rank is dots."""
    codes = _distinct(rng, max(tokens // TOKENS_A_CODE, 4), string.ascii_lowercase, CODE_LETTERS)
    codes[0] = "..."
    text = [code for rank, code in enumerate(codes, start=1) for _ in range(int(units / ZETA_2 / rank**2))]
    rng.shuffle(text)
    return FWE.format(context=" ".join(text)), tuple(codes[1:4])


def _distinct(rng: random.Random, count: int, alphabet: str, letters: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(alphabet, k=letters))] = None
    return list(found)


# By RULER's names: who writes a prompt of so many units, new tokens, and the fewest units. (Fewer codes would
# leave the third and the fourth equally frequent.)
WORD_TASKS: dict[str, tuple[Callable[[random.Random, int, int, Sequence[str]], Written], int, int]] = {
    "vt": (_variables, 30, HOPS + 1),
    "cwe": (_common, 120, COMMON + 1),
    "fwe": (_frequent, 50, 60),
}
