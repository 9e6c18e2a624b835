"""Exact-match metrics of GSM8K, MATH-500 and AIME."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def gsm8k(answer: str, accepted: Sequence[str], details: Mapping[str, Any]) -> float:
    """Whether the number after ``####``, in a box, or else the last one, is right (arXiv 2110.14168)."""
    said = _number(_after_hashes(answer) or last_boxed(answer) or answer)
    return float(said is not None and any(said == _number(text) for text in accepted))


def aime(answer: str, accepted: Sequence[str], details: Mapping[str, Any]) -> float:
    """Whether the boxed integer, or else the last number, is right; 073 is 73."""
    said = _number(last_boxed(answer) or answer)
    return float(said is not None and any(said == _number(text) for text in accepted))


def boxed(answer: str, accepted: Sequence[str], details: Mapping[str, Any]) -> float:
    """Whether the last boxed expression equals the answer, written alike or the same number.

    Hendrycks et al.'s normalisation (arXiv 2103.03874): no symbolic comparison, so 2x + 1 is not 1 + 2x.
    """
    said = last_boxed(answer)
    if said is None:
        return 0.0
    return float(any(_same(normalise(said), normalise(text)) for text in accepted))


def last_boxed(text: str) -> str | None:
    r"""What is in the last ``\boxed{...}`` (or ``\fbox``), braces matched; None without one."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    first = text.index("{", start) + 1
    depth = 1
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first:place]
    return None


def normalise(text: str) -> str:
    r"""One way of writing: no spaces, units, ``\left``, dollar or degree signs; ``\frac12`` in braces."""
    text = re.sub(r"\\text\{\s.*?\}$", "", text)
    text = re.sub(r"\\(?:text|mbox|mathrm)\{(.*?)\}", r"\1", text)
    for old, new in (
        *(("\n", ""), ("\\!", ""), ("\\,", ""), ("\\left", ""), ("\\right", "")),
        *(("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", ""), ("\\%", ""), ("%", "")),
        *(("tfrac", "frac"), ("dfrac", "frac"), ("\\\\", "\\")),
    ):
        text = text.replace(old, new)
    text = "".join(text.split()).rstrip(".")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:
        text = text.split("=")[1]
    return f"0{text}" if text.startswith(".") else text


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = _value(one), _value(other)
    return first is not None and first == second


def _value(text: str) -> Fraction | None:
    fraction = re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}", text)
    if fraction:
        text = f"{fraction[1]}{fraction[2]}/{fraction[3]}"
    try:
        return Fraction(re.sub(r"(?<=\d),(?=\d{3})", "", text))
    except (ValueError, ZeroDivisionError):
        return None


def _after_hashes(text: str) -> str | None:
    _, mark, after = text.rpartition("####")
    return after.strip().split("\n")[0] if mark else None


def _number(text: str) -> Fraction | None:
    found = _NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "").replace("$", "")) if found else None
