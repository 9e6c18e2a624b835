"""LongBench's metrics (arXiv 2308.14508; THUDM/LongBench, metrics.py and eval.py), English tasks.

Two stand-ins: ROUGE-L is computed here as the package ``rouge`` does (F1 of the longest common subsequence
of words), and code similarity is difflib's ratio where LongBench calls ``fuzz.ratio``, which is the same
formula without the package python-Levenshtein.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

One = Callable[[str, str, Mapping[str, Any]], float]


def best(metric: One) -> Callable[[str, Sequence[str], Mapping[str, Any]], float]:
    """The best score over the accepted answers; of some tasks only the first line counts (first_line)."""

    def score(answer: str, accepted: Sequence[str], details: Mapping[str, Any]) -> float:
        if details.get("first_line"):
            answer = answer.lstrip("\n").split("\n")[0]
        return max((metric(answer, text, details) for text in accepted), default=0.0)

    return score


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's)."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def qa_f1(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """F1 of the words two answers share."""
    said, wanted = normalise(answer).split(), normalise(truth).split()
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def rouge_l(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """F1 of the longest common subsequence of words."""
    said, wanted = answer.split(), truth.split()
    if not said or not wanted:
        return 0.0
    row = [0] * (len(wanted) + 1)
    for word in said:
        before = row[:]
        for place, other in enumerate(wanted):
            row[place + 1] = before[place] + 1 if word == other else max(row[place], before[place + 1])
    return 2 * row[-1] / (len(said) + len(wanted))


def classification(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """1 / number of class names in the answer, if the right one is among them."""
    named = [name for name in details["all_classes"] if name in answer]
    # A name inside the right one ("other" in "other entity") is not a second answer.
    named = [name for name in named if not (name in truth and name != truth)]
    return 1 / len(named) if truth in named else 0.0


def retrieval(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """Share of the numbers in the answer that are the paragraph's."""
    wanted = re.findall(r"Paragraph (\d+)", truth)
    numbers = re.findall(r"\d+", answer)
    return numbers.count(wanted[0]) / len(numbers) if wanted and numbers else 0.0


def count(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """Share of the numbers in the answer that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """Similarity of the answer's first line of code to the right one."""
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, code, truth).ratio()) / 100
