"""How long a stop_regex can take: SGLang matches it after every token, on the scheduler's thread.

Python's matcher goes back and tries again; ``(a+)+b`` on thirty letters a tries a billion ways. The number of
ways is bounded from above by the pattern alone, so that it can be refused before it runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# SGLang looks at so many of an answer's last tokens after each of them; they are about ENDLESS characters.
MOST_TOKENS = 512
# Repeats without an end are counted as this many, and so are the places where a match may begin.
ENDLESS = 2048
# ENDLESS places to begin at and one repeat without an end at each, or an anchor and two of them.
MOST_BITS = 22.1


def check_stop_regex(pattern: str) -> None:
    """Raise ValueError if ``pattern`` is no regular expression or can take too long."""
    from re import _parser  # type: ignore[attr-defined]

    try:
        parsed = _parser.parse(pattern)
        bits = _ways(list(_flat(parsed)), bool(parsed.state.flags & re.IGNORECASE)) + _start_bits(parsed)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"stop_regex: {pattern!r} is not a regular expression: {error}") from None
    if bits > MOST_BITS:
        raise ValueError(
            f"stop_regex: {pattern!r} can take too long to match; allowed are one repeat without an end (two "
            "behind ^) that may stop anywhere in what follows it, any number that may not, as in "
            "\\d+\\.\\d+, and no choice or repeat inside a repeat"
        )


def _start_bits(parsed: Any) -> float:
    first = parsed[0] if len(parsed) else None
    anchored = first is not None and str(first[0]) == "AT" and str(first[1]) in _BEGINNINGS
    return 0.0 if anchored and not parsed.state.flags & re.MULTILINE else math.log2(ENDLESS)


_BEGINNINGS = ("AT_BEGINNING", "AT_BEGINNING_STRING")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def _flat(parsed: Any) -> Iterator[tuple[str, Any]]:
    """The items of a pattern in order, those of plain groups among them."""
    for code, value in parsed:
        if str(code) == "SUBPATTERN" and not (value[1] or value[2]):
            yield from _flat(value[3])
        else:
            yield str(code), value


def _ways(items: Sequence[tuple[str, Any]], any_case: bool) -> float:
    """Binary logarithm of the number of ways a matcher tries before it gives up, an upper bound.

    A repeat that takes none of the characters that may follow it ends at one place, and all such together
    read a text once; others multiply the ways of what follows. What can only match is tried once.
    """
    bits, following, certain = 0.0, 0, True
    for code, value in reversed(items):
        chars, fixed = _repeated(code, value, any_case)
        if fixed:
            optional = code in _REPEATS and value[0] == 0
            bits += _bits_of(code, value)
            certain = certain and optional
            following = _first(code, value, any_case)
            continue
        least, most, _ = value
        if certain:
            bits = max(math.log2(min(int(least), ENDLESS) + 1), bits)
        elif not chars & following:
            bits = max(_choices(least, most), bits)
        else:
            bits += _choices(least, most)
        certain = certain and least == 0
        following = chars | following if least == 0 else chars
    return bits


def _first(code: str, value: Any, any_case: bool) -> int:
    """The characters that a match of one item may begin with, or more."""
    if code == "BRANCH":
        found = 0
        for part in value[1]:
            inner = list(_flat(part))
            found |= _first(*inner[0], any_case) if inner else ALL
        return found
    if code in _REPEATS and value[0] == 0:
        return ALL
    return _repeated(code, value, any_case)[0] or ALL


def _repeated(code: str, value: Any, any_case: bool) -> tuple[int, bool]:
    """The characters of an item of one of them, repeated or not; whether its length is fixed."""
    fixed = True
    if code in _REPEATS:
        inner = list(_flat(value[2]))
        if len(inner) != 1:
            return 0, True
        fixed = value[0] == value[1]
        code, value = inner[0]
    chars = _chars(code, value, any_case)
    return chars, fixed or not chars


def _choices(least: Any, most: Any) -> float:
    most = min(int(most), ENDLESS)
    return math.log2(most - min(int(least), most) + 1)


def _bits(pattern: Any) -> float:
    return sum(_bits_of(str(code), value) for code, value in pattern)


def _bits_of(code: str, value: Any) -> float:
    """Binary logarithm of the number of ways one item can match, whatever follows it."""
    if code in _REPEATS:
        least, most, inner = value
        return _choices(least, most) + min(int(most), ENDLESS) * _bits(inner)
    if code == "BRANCH":
        parts = [_bits(part) for part in value[1]]
        highest = max(parts)
        return highest + math.log2(sum(2.0 ** (part - highest) for part in parts))
    if code == "SUBPATTERN":
        return _bits(value[3])
    if code in ("ASSERT", "ASSERT_NOT"):
        return _bits(value[1])
    if code == "ATOMIC_GROUP":
        return _bits(value)
    if code == "GROUPREF_EXISTS":
        return 1.0 + _bits(value[1]) + (_bits(value[2]) if value[2] else 0.0)
    return 0.0


# Sets of characters are the bits of a number: 0 to 255, and four for digits, other letters, space and the
# rest of Unicode.
_DIGIT, _LETTER, _SPACE, _REST = (1 << bit for bit in range(256, 260))
ALL = (1 << 260) - 1


def _where(test: Callable[[str], bool]) -> int:
    return sum(1 << code for code in range(256) if test(chr(code)))


_CATEGORIES = {
    "CATEGORY_DIGIT": _where(str.isdecimal) | _DIGIT,
    "CATEGORY_WORD": _where(lambda one: one.isalnum() or one == "_") | _DIGIT | _LETTER,
    "CATEGORY_SPACE": _where(str.isspace) | _SPACE,
}
_BEYOND = _DIGIT | _LETTER | _SPACE | _REST


def _chars(code: str, value: Any, any_case: bool) -> int:
    """The characters that an item of one character may be, or more; 0 for other items."""
    if code == "IN":
        inner = [(str(one), what) for one, what in value]
        found = 0
        for one, what in inner:
            found |= _chars(one, what, any_case)
        return ALL & ~found | _BEYOND if inner[0][0] == "NEGATE" else found
    if code in ("LITERAL", "RANGE"):
        low, high = (value, value) if code == "LITERAL" else value
        if high >= 256:
            return (ALL >> low << low) if low < 256 else _BEYOND
        found = sum(1 << one for one in range(low, high + 1))
        if any_case:
            found |= _where(lambda one: any(found >> ord(other) & 1 for other in _cases(one))) | _LETTER
        return found
    if code == "CATEGORY":
        name = str(value)
        return _CATEGORIES[name] if name in _CATEGORIES else ALL & ~_CATEGORIES[name.replace("_NOT", "")]
    return ALL if code in ("ANY", "NOT_LITERAL") else 0


def _cases(one: str) -> Iterator[str]:
    return (other for other in (one.lower(), one.upper()) if len(other) == 1 and ord(other) < 256)
