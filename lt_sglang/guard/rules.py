"""Grammars as XGrammar writes them: a JSON schema, EBNF, any other kind, as plain rules.

A character is one of 0 to 255, or "another"; sets of them are the bits of a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

OTHER = 256
ALL = (1 << (OTHER + 1)) - 1


class Ambiguous(ValueError):
    """A grammar that may take too long; the message says what to change."""


@dataclass(frozen=True)
class Part:
    """One part of an alternative: a character of ``chars``, any number of them, or a rule, repeated.

    most: of the repeats; -1 for no end.
    """

    chars: int = 0
    star: bool = False
    rule: str = ""
    least: int = 1
    most: int = 1

    @property
    def varies(self) -> bool:
        """Whether the number of repeats is not fixed."""
        return self.least != self.most


@dataclass
class Rule:
    """A rule's alternatives, and what is known of the texts it matches.

    nullable: the empty one is among them. first: characters they begin with. reach: characters that may
    follow one of them and make a longer one. alphabet: all their characters.
    """

    alternatives: list[tuple[Part, ...]] = field(default_factory=list)
    nullable: bool = False
    first: int = 0
    reach: int = 0
    alphabet: int = 0


_TOKEN = re.compile(
    r"""\s+ | (?P<string>"(?:[^"\\]|\\.)*") | (?P<set>\[(?:[^\]\\]|\\.)*\])(?P<star>\*?)
    | (?P<name>[\w.-]+)(?:\{(?P<least>\d+),\ (?P<most>-?\d+)\})? | (?P<mark>[()|=])""",
    re.VERBOSE | re.DOTALL,
)
_RULE = re.compile(r"^([\w.-]+) ::= ", re.MULTILINE)
_CHARACTER = re.compile(r"\\x..|\\u....|\\U........|\\.|.", re.DOTALL)
_ESCAPES = {
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "f": "\f",
    "v": "\v",
    "a": "\a",
    "b": "\b",
    "e": "\x1b",
    "0": "\0",
}


def parse(text: str) -> dict[str, Rule]:
    """XGrammar's rules; a rule of another kind, such as TagDispatch, counts as matching nothing."""
    begins = list(_RULE.finditer(text))
    ends = [found.start() for found in begins[1:]] + [len(text)]
    rules = {found[1]: Rule() for found in begins}
    for found, end in zip(begins, ends, strict=True):
        body = text[found.end() : end]
        if body.startswith("("):
            rules[found[1]].alternatives = list(_alternatives(body, rules))
        else:
            rules[found[1]].alternatives = [()]
    return rules


def _alternatives(body: str, rules: dict[str, Rule]) -> Iterator[tuple[Part, ...]]:
    parts: list[Part] = []
    depth = place = 0
    while place < len(body):
        found = _TOKEN.match(body, place)
        if found is None:
            raise Ambiguous(f"{body[place : place + 20]!r} is unknown to this version")
        place = found.end()
        if found["mark"]:
            depth += {"(": 1, ")": -1}.get(found["mark"], 0)
            if depth < 2 and found["mark"] == ")":
                if depth == 0:
                    return  # a lookahead may follow
                yield tuple(parts)
                parts = []
        elif found["string"] == '""' and depth == 1:
            yield ()
        elif found["string"]:
            parts += [Part(_bit(one)) for one in _CHARACTER.findall(found["string"][1:-1])]
        elif found["set"]:
            parts.append(Part(_set(found["set"][1:-1]), star=bool(found["star"])))
        elif found["name"]:
            if found["name"] not in rules:
                raise Ambiguous(f"{found['name']} is unknown to this version")
            least = 1 if found["least"] is None else int(found["least"])
            parts.append(Part(rule=found["name"], least=least, most=int(found["most"] or 1)))


def unescaped(text: str) -> str:
    """A string as XGrammar writes it, without the escapes."""
    return "".join(chr(_code(one)) for one in _CHARACTER.findall(text))


def _set(text: str) -> int:
    negated = text.startswith("^")
    ones = _CHARACTER.findall(text[negated:])
    found, index = 0, 0
    while index < len(ones):
        low = high = _code(ones[index])
        if index + 2 < len(ones) and ones[index + 1] == "-":
            high = _code(ones[index + 2])
            index += 2
        index += 1
        found |= ((1 << (min(high, OTHER - 1) + 1)) - 1) & ~((1 << low) - 1) if low < OTHER else 0
        found |= int(high >= OTHER) << OTHER
    # Some other character is outside of any set that is not all of them.
    return (ALL & ~found) | (1 << OTHER) if negated else found


def _bit(one: str) -> int:
    return 1 << min(_code(one), OTHER)


def _code(one: str) -> int:
    if len(one) == 1:
        return ord(one)
    if one[1] in "xuU":
        return int(one[2:], 16)
    return ord(_ESCAPES.get(one[1], one[1]))
