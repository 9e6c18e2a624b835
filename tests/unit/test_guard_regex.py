"""lt_sglang.guard.stop_regex: what may run on the scheduler's thread."""

from __future__ import annotations

import multiprocessing
import re

import pytest

from lt_sglang.guard.stop_regex import check_stop_regex

FINE = [
    "",
    "a",
    "foo|bar|baz",
    r"\n\n\s*",
    r"[A-Z][a-z]+:",
    r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}",
    r"(?i)end of (story|file)",
    r"^\s*}\s*$",
    "colou?rs?",
    "(?:abc){3}",
    r"(?<=\n)\Z",
    ".*foo.*",
    "(a)?" * 40,
]
EVERYDAY = [
    r"\d+\.\d+",
    r"\d{4}-\d{2}-\d{2}",
    r"\d+:\d+:\d+",
    r"-?\d+\.?\d*",
    r"\$\d+(\.\d{2})?",
    r"\d+\s*(kg|cm|m)",
    r"[\w.+-]+@[\w-]+\.[\w.-]+",
    r"https?://\S+",
    r"[A-Z][a-z]+ [A-Z][a-z]+",
    r"[.!?]\s+[A-Z]",
    r"\b[A-Z]{2,}\b",
    r"#[0-9a-fA-F]{6}",
    r"\"[^\"]*\"",
    r"\w+\(\w*\)",
    r"</?[a-z]+>",
    r"<\|[a-z_]+\|>",
    r"```\w*\n",
    r"\n\s*\n",
    r"^\d+\.\s+\w+",
    r"Answer:\s*\d+",
    r"(?i)the end\.?$",
    r"-{3,}",
]
SLOW = [
    ".*foo.*bar",
    r"\w+\d+:",
    r"\d+\.?\d*x",
    r"(?i)[A-Z]+a+!",
    r"[\s\S]*[\s\S]*\x00",
    "(a+)+b",
    "(a|aa)+b",
    "(a*)*b",
    "(?:a?){60}b",
    "a?" * 60 + "b",
    "a{0,99}" * 20 + "b",
    ".*a.*b.*c",
    "(?=(a+)+b)",
    "((a|b|aa)+)",
    "(a)?" * 40 + "b",
]


@pytest.mark.parametrize("pattern", FINE + EVERYDAY)
def test_ordinary_patterns_pass(pattern: str) -> None:
    check_stop_regex(pattern)


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_may_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^stop_regex: .*can take too long"):
        check_stop_regex(pattern)


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "(?P<x", "[", "*", "(?<=a+)b(", "a" + "(" * 3000])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^stop_regex: .*is not a regular expression"):
        check_stop_regex(pattern)


def _search(pattern: str, text: str) -> None:
    re.search(pattern, text)


@pytest.mark.parametrize("pattern", FINE + EVERYDAY)
def test_what_passes_is_quick_on_a_long_answer(pattern: str) -> None:
    """4,096 characters of each kind that makes a matcher go back; a quadratic number of steps takes 0.2 s."""
    for piece in ("a", "A", "1", " ", "1.", "a@a.", "<a", "\n ", "1 1 ", '"', "--", "f(a", "A a. "):
        _within(5.0, pattern, (piece * 4096)[:4096] + "\x00")


def test_what_is_refused_is_slow() -> None:
    with pytest.raises(TimeoutError):
        _within(1.0, "(a+)+b", "a" * 64)


def _within(seconds: float, pattern: str, text: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=_search, args=(pattern, text))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(pattern)
    assert process.exitcode == 0
