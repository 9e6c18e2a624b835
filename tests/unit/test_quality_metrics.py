"""Published metrics: known answers, and independent computations."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from typing import Any

import pytest

from lt_sglang.eval.metrics import METRICS
from lt_sglang.eval.metrics.mathematics import last_boxed, normalise

Words = tuple[str, ...]
CASES: list[tuple[str, str, list[str], dict[str, Any], float]] = [
    ("begins", " 12345. The", ["12345"], {}, 1),
    ("begins", "It is 12345", ["12345"], {}, 0),
    ("contains-all", "7654321 and 1234567", ["1234567", "7654321", "1111111"], {}, 2 / 3),
    ("contains-all", "FF-00", ["ff-00"], {}, 1),
    ("contains-every", "7654321 and ff-00", ["FF-00", "7654321"], {}, 1),
    ("contains-every", "7654321 and ff-01", ["FF-00", "7654321"], {}, 0),
    ("withholds", "I cannot tell.", ["FF-00", "7654321"], {}, 1),
    ("withholds", "It is ff-00.", ["FF-00", "7654321"], {}, 0),
    ("qa-f1", "The cat sat.", ["a cat sat down"], {}, 0.8),
    ("qa-f1", "nothing", ["a cat", "Nothing!"], {}, 1),
    ("qa-f1", "Paris\nLondon", ["Paris"], {"first_line": True}, 1),
    ("contains-any", "It was paris.", ["Paris", "London"], {}, 1),
    ("contains-any", "Rome", ["Paris", "London"], {}, 0),
    ("contains-every", "1 and 2", ["1", "2"], {}, 1),
    ("contains-every", "1", ["1", "2"], {}, 0),
    ("withholds", "I cannot tell", ["12345"], {}, 1),
    ("withholds", "It is 12345", ["12345"], {}, 0),
    ("qa-f1-zh", "答案是北京。", ["北京"], {}, 4 / 7),
    ("qa-f1-zh", "北京！", ["东京", "北 京"], {}, 1),
    ("rouge-l-zh", "北京是首都", ["首都是北京"], {}, 1 / 5 + 1 / 5),
    ("rouge-l", "", ["something"], {}, 0),
    ("choice", "The correct answer is **(C)**, as", ["C"], {}, 1),
    ("choice", "The correct answer is C", ["C"], {}, 1),
    ("choice", "C", ["C"], {}, 0),
    ("recall", "She drives a red car", ["the red car"], {}, 1),
    ("recall", "red", ["a red car, a blue car"], {}, 1 / 4),
    ("ifeval", "yes", [], {"instructions": [("change_case:english_lowercase", {})]}, 1),
    ("classification", "Abbreviation", ["Abbreviation"], {"all_classes": ["Abbreviation", "City"]}, 1),
    ("classification", "City or Abbreviation", ["City"], {"all_classes": ["Abbreviation", "City"]}, 0.5),
    ("classification", "Other entity", ["Other entity"], {"all_classes": ["Other entity", "entity"]}, 1),
    ("retrieval", "Paragraph 5, or 7", ["Paragraph 5"], {}, 0.5),
    ("count", "12", ["12"], {}, 1),
    ("count", "12 or 13 or 14", ["13"], {}, 1 / 3),
    ("code-similarity", "# a comment\nreturn x + 1\n", ["return x + 1"], {}, 1),
    ("gsm8k", "so 3 * 14 = 42.\n#### 42", ["42"], {}, 1),
    ("gsm8k", "She has 1,250 dollars", ["1250"], {}, 1),
    ("gsm8k", "\\boxed{7} of 12", ["7"], {}, 1),
    ("gsm8k", "no number", ["7"], {}, 0),
    ("math", "so it is $\\boxed{\\dfrac{1}{2}}$.", ["\\frac12"], {}, 1),
    ("math", "\\boxed{0.5}", ["\\frac{1}{2}"], {}, 1),
    ("math", "\\boxed{x = 5}", ["5"], {}, 1),
    ("math", "\\boxed{(3, \\frac{\\pi}{2})}", ["\\left( 3, \\frac{\\pi}{2} \\right)"], {}, 1),
    ("math", "the answer is 5", ["5"], {}, 0),
    ("math", "\\boxed{6}", ["5"], {}, 0),
    ("aime", "Thus \\boxed{073}.", ["73"], {}, 1),
    ("aime", "\\boxed{74}", ["73"], {}, 0),
]


@pytest.mark.parametrize(("metric", "answer", "accepted", "details", "expected"), CASES)
def test_known_answers(
    metric: str, answer: str, accepted: list[str], details: dict[str, Any], expected: float
) -> None:
    assert METRICS[metric](answer, accepted, details) == pytest.approx(expected)


def test_every_metric_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(METRICS)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("the cat sat on the mat", "the cat on mat", 0.8888888839506174),
        (
            "The committee met. It approved the budget. Nobody objected.",
            "The budget was approved by the committee. There were no objections.",
            0.39999999505,
        ),
        ("a b. c a", "a c. b a. c", 0.6666666616666668),
        ("One. Two. Three.", "Three. Two. One.", 0.999999995),
        (
            "police said the the man was found. He was arrested.",
            "the man was arrested. police found him.",
            0.7999999950222222,
        ),
    ],
)
def test_rouge_l_as_by_the_package_rouge(answer: str, truth: str, expected: float) -> None:
    """Values of ``rouge`` 1.0.1, which LongBench uses."""
    assert METRICS["rouge-l"](answer, [truth], {}) == pytest.approx(expected, abs=1e-6)


def test_rouge_l_and_f1_of_random_words() -> None:
    """Against the recursive definition of the longest common subsequence, and counted words."""
    rng = random.Random(0)
    for _ in range(40):
        said = rng.sample("pqrstuvwxyz", rng.randint(1, 8))
        wanted = rng.sample("pqrstuvwxyz", rng.randint(1, 8))

        @cache
        def common(i: int, j: int, x: Words = tuple(said), y: Words = tuple(wanted)) -> int:
            if i == len(x) or j == len(y):
                return 0
            if x[i] == y[j]:
                return 1 + common(i + 1, j + 1)
            return max(common(i + 1, j), common(i, j + 1))

        precision, recall = common(0, 0) / len(said), common(0, 0) / len(wanted)
        expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
        assert METRICS["rouge-l"](" ".join(said), [" ".join(wanted)], {}) == pytest.approx(expected)
        said += [rng.choice("pqrst") for _ in range(4)]
        shared = sum(min(n, Counter(wanted)[word]) for word, n in Counter(said).items())
        precision, recall = shared / len(said), shared / len(wanted)
        expected = 2 * precision * recall / (precision + recall) if shared else 0
        assert METRICS["qa-f1"](" ".join(said), [" ".join(wanted)], {}) == pytest.approx(expected)


def test_boxes() -> None:
    assert last_boxed("\\boxed{1} then \\boxed{\\frac{a}{b}}") == "\\frac{a}{b}"
    assert last_boxed("\\boxed{unclosed") is None
    assert last_boxed("none") is None
    assert normalise("90^\\circ") == normalise("90") == "90"
    assert normalise("\\text{Evelyn}") == "Evelyn"
    assert normalise("10\\text{ cm}") == "10"
