"""What bar 2 of LightTransfer-Train trains and asks: many keys in a long context, and running text.

A context states ``keys`` pass keys, each of a place with a two-word name, and nothing twice; questions stand
at its end, where no window of a lazy layer reaches the keys. Places, sentences, text and seeds of training
and test share nothing. Nothing is downloaded: training text are docstrings of installed packages, the test's
text is Python's language reference.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lt_sglang.eval.tasks.haystack import SENTENCES as TEST_SENTENCES
from lt_sglang.eval.tasks.haystack import documentation

DIGITS = 5
WINDOW_MARGIN = 100
FRAME_MARGIN = 40  # the digits, and what sentences take more together than apart
_TEXT = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
# Adjectives and nouns of places.
WORDS: dict[str, list[list[str]]] = _TEXT["words"]
SENTENCES = {"train": tuple(_TEXT["sentences"]), "test": TEST_SENTENCES}
SEEDS = {"train": 1, "pilot": 2, "test": 3}
# Of these the docstrings are read; what is not installed is left out.
TEXT_PACKAGES = ("numpy", "pandas", "datasets", "accelerate", "trl", "peft", "torch", "transformers")
CHARACTERS_A_TOKEN = 5  # more than there are


@dataclass(frozen=True)
class Context:
    """text: the user's turn, without a question. keys: place -> digits, in the order stated."""

    text: str
    keys: dict[str, str]


def context(tokenizer: Any, rng: random.Random, split: str, keys: int, tokens: int, behind: int) -> Context:
    """About ``tokens`` tokens with ``keys`` keys, none in the last ``behind`` of them."""
    adjectives, nouns = WORDS[split]
    names = rng.sample([f"{one} {other}" for one in adjectives for other in nouns], keys)
    stated = {name: "".join(rng.choice("0123456789") for _ in range(DIGITS)) for name in names}
    lines = [f"The pass key of the {name} is {digits}." for name, digits in stated.items()]
    size = {line: len(tokenizer(f" {line}")["input_ids"]) for line in {*SENTENCES[split]}}
    left = tokens - sum(len(tokenizer(f" {line}")["input_ids"]) for line in lines)
    filler: list[str] = []
    tail: list[str] = []
    room = behind
    while left > 0:
        line = rng.choice(SENTENCES[split])
        left -= size[line]
        if room > 0:
            tail.append(line)
            room -= size[line]
        else:
            filler.append(line)
    for place, line in sorted(((rng.randint(0, len(filler)), line) for line in lines), reverse=True):
        filler.insert(place, line)
    return Context(" ".join([*filler, *tail]), stated)


def question(place: str) -> str:
    return f"What is the pass key of the {place}?"


def answer(place: str) -> str:
    return f"The pass key of the {place} is"


def training_lines(
    tokenizer: Any, samples: int, tokens: int, window: int, text_tokens: int, most_keys: int
) -> Iterator[dict[str, Any]]:
    """Of three, two are conversations about keys, one is running text with ``text_tokens`` to learn."""
    rng = random.Random(SEEDS["train"])
    prose = docstring_ids(tokenizer, (samples // 3 + 1) * (tokens - 8), rng)
    cut = 0
    for number in range(samples):
        if number % 3 == 2:
            size = tokens - 8
            ids = prose[cut : cut + size]
            cut = cut + size if cut + 2 * size <= len(prose) else 0
            split = len(ids) - text_tokens
            yield {"prompt": tokenizer.decode(ids[:split]), "completion": tokenizer.decode(ids[split:])}
            continue
        keys = min(most_keys, max(1, round(2 ** rng.uniform(0, most_keys.bit_length()))))
        asked_most = max(1, min(24, (tokens - window) // 160))
        turns = tokens - 100 - 48 * min(keys, asked_most)
        made = context(tokenizer, rng, "train", keys, turns, window + WINDOW_MARGIN)
        asked = rng.sample(list(made.keys), min(keys, asked_most))
        messages = []
        for turn, place in enumerate(asked):
            before = f"{made.text} " if turn == 0 else ""
            messages.append({"role": "user", "content": before + question(place)})
            messages.append({"role": "assistant", "content": f"{answer(place)} {made.keys[place]}."})
        yield {"messages": messages}


@dataclass(frozen=True)
class Question:
    """prompt: up to the answer's digits. digits: their token ids."""

    prompt: list[int]
    digits: list[int]


def questions(tokenizer: Any, split: str, count: int, keys: int, tokens: int, window: int) -> list[Question]:
    """``count`` prompts of at most ``tokens`` tokens, the digits included; one asks for one key of ``keys``.

    split: "test", or "pilot" for those that find how many keys are hard enough.
    """
    found = []
    longest = " ".join(max(words, key=len) for words in WORDS["test"])
    frame = _prompt(tokenizer, question(longest), longest)
    left = tokens - len(frame) - FRAME_MARGIN
    for number in range(count):
        rng = random.Random(f"{SEEDS[split]}:{keys}:{tokens}:{number}")
        made = context(tokenizer, rng, "test", keys, left, window + WINDOW_MARGIN)
        place = rng.choice(list(made.keys))
        prompt = _prompt(tokenizer, f"{made.text} {question(place)}", place)
        digits = tokenizer(f" {made.keys[place]}", add_special_tokens=False)["input_ids"]
        assert len(prompt) + len(digits) <= tokens, (len(prompt), tokens)
        found.append(Question(prompt, list(digits)))
    return found


def _prompt(tokenizer: Any, content: str, place: str) -> list[int]:
    """A conversation up to where the answer's digits begin."""
    turn = [{"role": "user", "content": content}]
    head = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(head + answer(place), add_special_tokens=False)["input_ids"])


def docstring_ids(tokenizer: Any, tokens: int, rng: random.Random) -> list[int]:
    """At least ``tokens`` ids of running text from docstrings; fewer if the packages have no more."""
    found: dict[str, None] = {}
    size = 0
    for file in _files():
        for text in _docstrings(file):
            size += 0 if text in found else len(text)
            found[text] = None
        if size > CHARACTERS_A_TOKEN * tokens:
            break
    texts = list(found)
    rng.shuffle(texts)
    ids: list[int] = []
    for text in texts:
        if len(ids) >= tokens:
            break
        ids += tokenizer(f"{text}\n\n")["input_ids"]
    return ids


def _files() -> Iterator[Path]:
    for name in TEXT_PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield from sorted(Path(folder).rglob("*.py"))


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError, RecursionError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)) and len(text) > 300:
            yield text


def held_out(tokenizer: Any, passages: int, tokens: int) -> list[list[int]]:
    """Passages of Python's language reference, evenly spread."""
    ids = tokenizer(documentation())["input_ids"]
    places = max(1, len(ids) // tokens)
    picked = [place * places // passages for place in range(min(passages, places))]
    return [list(ids[place * tokens : (place + 1) * tokens]) for place in dict.fromkeys(picked)]


def write_training(path: Path, lines: Iterator[dict[str, Any]]) -> int:
    """JSON lines; how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
            count += 1
    return count


def shared(train: Path, asked: Sequence[Question], tokenizer: Any) -> int:
    """Digits of the test's answers that stand in training data; they must not carry anything over.

    Five digits drawn at random meet by chance; a key's place never does.
    """
    text = train.read_text(encoding="utf-8")
    return sum(f" {tokenizer.decode(one.digits).strip()}." in text for one in asked)
