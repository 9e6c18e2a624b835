"""How long a stop_regex can take: SGLang matches it after every token, on the scheduler's thread.

Python's matcher goes back and tries again; ``(a+)+b`` on thirty letters a tries a billion ways. The number of
ways is bounded from above by the pattern alone, so that it can be refused before it runs.
"""

from __future__ import annotations

import math
import re
from typing import Any

# Repeats without an end are counted as this many; no answer is much longer in characters.
ENDLESS = 4096
# Two endless repeats one after the other are still allowed: 2 ** 24 ways.
MOST_BITS = 24.1


def check_stop_regex(pattern: str) -> None:
    """Raise ValueError if ``pattern`` is no regular expression or can take too long."""
    from re import _parser  # type: ignore[attr-defined]

    try:
        bits = _bits(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"stop_regex: {pattern!r} is not a regular expression: {error}") from None
    if bits > MOST_BITS:
        raise ValueError(
            f"stop_regex: {pattern!r} can take too long to match; at most two repeats without an end, and no "
            "choice or repeat inside a repeat, are allowed"
        )


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
