"""IFEval's instructions: for each kind an answer that follows it and one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from lt_sglang.eval.metrics.ifeval import CHECKS

LESS, LEAST = {"relation": "less than"}, {"relation": "at least"}
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["rock", "Mom"]}, ["ROCKS, mom"], ["rock"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, **LEAST}, ["War and war"], ["war"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, **LESS}, ["war"], ["war, war"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, ["rocky"], ["a Rock."]),
    (
        "keywords:letter_frequency",
        {"letter": "T", "let_frequency": 2, "let_relation": "less than"},
        ["a T", "none"],
        ["to tell"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": "at least"},
        ["a! b!"],
        ["a!"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, **LESS},
        ["One. Two!"],
        ["One. Two! Three?"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a *** b***"],
        ["a", "a *** *** b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, **LEAST}, ["one two-three"], ["one two"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        ["a\n\n'weekend', b"],
        ["a\n\nb", "a", "a\n\nweekend\n\nc"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b c]"], ["[a]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\np. s. b"], ["PS b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S b"], ["P.S. b"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n  - b"],
        ["* a", "* a\n* b\n* c", "**a**"],
    ),
    ("detectable_format:constrained_response", {}, ["So: My answer is no."], ["No."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* **b**"], ["*a*", "** **"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["SECTION 1 SECTION 2", "Section 1"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ["a: 1"]),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<< >>", "<title>"]),
    ("combination:two_responses", {}, ["a******b", "a******b******"], ["a", "a******a", "a****** ******b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, [" say IT. ok"], ["ok. Say it."]),
    (
        "startend:end_checker",
        {"end_phrase": "Any questions?"},
        ['"So. any questions?" '],
        ["Any questions? No."],
    ),
    ("startend:quotation", {}, [' "a\nb" '], ['"', '"a" b']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["THE R2D2 x", "A B"],
        ["The END"],
    ),
    ("change_case:english_capital", {}, ["ALL 4!"], ["All", "4"]),
    ("change_case:english_lowercase", {}, ["all 4"], ["All"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]


@pytest.mark.parametrize(("kind", "given", "follow", "fail"), CASES)
def test_instruction(kind: str, given: dict[str, Any], follow: list[str], fail: list[str]) -> None:
    assert set(given) == set(CHECKS[kind].arguments)
    assert all(isinstance(given[name], of) for name, of in CHECKS[kind].arguments.items())
    assert [CHECKS[kind].follows(answer, given) for answer in (*follow, *fail)] == [True] * len(follow) + [
        False
    ] * len(fail)


def test_every_published_kind_has_a_case() -> None:
    """All 25 but the one that needs a language detector."""
    assert {kind for kind, *_ in CASES} == set(CHECKS) and len(CHECKS) == 24
