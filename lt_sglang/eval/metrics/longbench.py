"""LongBench's metrics (arXiv 2308.14508; THUDM/LongBench, metrics.py and eval.py).

ROUGE-L is computed as by the package ``rouge`` 1.0.1, code similarity as by fuzzywuzzy's ``fuzz.ratio``
without the package python-Levenshtein. One stand-in: Chinese answers are compared by characters, where
LongBench has jieba cut words, so that figures of the two Chinese tasks are not the published ones'.
"""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
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
    return _f1(normalise(answer).split(), normalise(truth).split())


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def recall(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """Share of the right answer's words that an answer has."""
    said, wanted = Counter(normalise(answer).split()), Counter(normalise(truth).split())
    return (said & wanted).total() / wanted.total() if wanted else 0.0


def choice(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """Whether the letter after "The correct answer is" is the right one (LongBench v2's pred.py)."""
    said = re.search(r"The correct answer is (?:\(([A-D])\)|([A-D]))", answer.replace("*", ""))
    return float(said is not None and (said[1] or said[2]) == truth)


def rouge_l(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """ROUGE-L of summaries: F1 of the different words in any longest common subsequence of two sentences."""
    said, wanted = _sentences(answer), _sentences(truth)
    common = {word for one in wanted for other in said for word in _common_subsequence(one, other)}
    total = sum(len({word for sentence in text for word in sentence}) for text in (said, wanted))
    return 2 * len(common) / total if said and wanted else 0.0


def _sentences(text: str) -> list[list[str]]:
    # A sentence of blanks has one word there, the empty one.
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """The longest one; of several, the one that is found from the end by stepping back in ``other``."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, its in enumerate(other):
            lengths[i + 1][j + 1] = (
                lengths[i][j] + 1 if word == its else max(lengths[i][j + 1], lengths[i + 1][j])
            )
    i, j, found = len(one), len(other), []
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.append(one[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def qa_f1_zh(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """F1 of the characters two answers share, without punctuation."""
    return _f1(_characters(answer), _characters(truth))


def rouge_l_zh(answer: str, truth: str, details: Mapping[str, Any]) -> float:
    """ROUGE-L of characters."""
    return rouge_l(" ".join(answer), " ".join(truth), details)


def _characters(text: str) -> list[str]:
    kinds = ((letter, unicodedata.category(letter)[0]) for letter in text.lower())
    return [letter for letter, kind in kinds if kind not in "PSZC"]


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
