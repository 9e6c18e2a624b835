"""How long a stop_regex can take: SGLang matches it after every token, on the scheduler's thread.

Python's matcher goes back and tries again; ``(a+)+b`` on thirty letters a tries a billion ways. The number of
ways is bounded from above by the pattern alone, so that it can be refused before it runs.
"""

from __future__ import annotations

import math
import re
from typing import Any

# SGLang looks at so many of an answer's last tokens after each of them; they are about ENDLESS characters.
MOST_TOKENS = 512
# Repeats without an end are counted as this many, and so are the places where a match may begin.
ENDLESS = 2048
# A match that may begin anywhere may have one repeat without an end, an anchored one two: 2 ** 22 ways.
MOST_BITS = 22.1


def check_stop_regex(pattern: str) -> None:
    """Raise ValueError if ``pattern`` is no regular expression or can take too long."""
    from re import _parser  # type: ignore[attr-defined]

    try:
        parsed = _parser.parse(pattern)
        bits = _bits(parsed) + _start_bits(parsed)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"stop_regex: {pattern!r} is not a regular expression: {error}") from None
    if bits > MOST_BITS:
        raise ValueError(
            f"stop_regex: {pattern!r} can take too long to match; allowed are one repeat without an end (two "
            "behind ^), and no choice or repeat inside a repeat"
        )


def _start_bits(parsed: Any) -> float:
    first = parsed[0] if len(parsed) else None
    anchored = first is not None and str(first[0]) == "AT" and str(first[1]) in _BEGINNINGS
    return 0.0 if anchored and not parsed.state.flags & re.MULTILINE else math.log2(ENDLESS)


_BEGINNINGS = ("AT_BEGINNING", "AT_BEGINNING_STRING")


def _bits(pattern: Any) -> float:
    """Binary logarithm of the number of ways a parsed pattern can match, an upper bound."""
    return sum(_bits_of(str(code), value) for code, value in pattern)


def _bits_of(code: str, value: Any) -> float:
    if code in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, inner = value
        most = min(int(most), ENDLESS)
        least = min(int(least), most)
        return math.log2(most - least + 1) + most * _bits(inner)
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
