"""Numbers as people write them on a command line or in a file."""

from __future__ import annotations

import math
import re

MAX_DIGITS = 18  # more is no number of anything here


def read_int(text: str) -> int | None:
    """The number that ``text`` writes in ASCII digits and nothing else; None if it writes none.

    ``int`` also reads other scripts' digits, signs, spaces and underscores.
    """
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS else None


def read_float(text: str) -> float | None:
    """The finite number that ``text`` writes in ASCII, such as 0.5 or 1e3; None if it writes none."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def read_amount(text: str) -> int | float | str:
    """A number of layers from 1, or a share between 0 and 1; ``text`` itself if it is neither."""
    number, share = read_int(text), read_float(text)
    if number is not None and number >= 1:
        return number
    return share if share is not None and 0 < share < 1 else text
