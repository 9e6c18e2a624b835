"""IFEval's instructions that a program can check (arXiv 2311.07911), and whether an answer follows them.

Two stand-ins, as nothing here downloads a tokenizer: sentences end at a full stop, question or exclamation
mark before a blank, and words in capitals are what is between blanks and signs. Of an answer in capitals or
small letters the language is not checked. ``language:response_language`` needs a detector and is not here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Given = Mapping[str, Any]
RELATIONS = ("less than", "at least")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


@dataclass(frozen=True)
class Check:
    """Whether an answer follows an instruction, and the instruction's arguments with their types."""

    follows: Callable[[str, Given], bool]
    arguments: Mapping[str, type] = field(default_factory=dict)


def follows(answer: str, accepted: Sequence[str], details: Mapping[str, Any]) -> float:
    """Whether the answer follows all its instructions (IFEval's prompt-level, strict accuracy)."""
    return float(
        bool(answer.strip())
        and all(CHECKS[kind].follows(answer, given) for kind, given in details["instructions"])
    )


def _related(count: int, given: Given, number: str, relation: str = "relation") -> bool:
    return count < given[number] if given[relation] == "less than" else count >= given[number]


def _found(pattern: str, text: str, flags: int = re.IGNORECASE) -> int:
    return len(re.findall(pattern, text, flags))


def _whole(parts: Sequence[str]) -> list[str] | None:
    """The parts that are not blank; None if one between two others is."""
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part.strip() for part in parts if part.strip()]


def _paragraphs(text: str, given: Given) -> bool:
    found = _whole(re.split(r"\s?\*\*\*\s?", text))
    return found is not None and len(found) == given["num_paragraphs"]


def _first_word(text: str, given: Given) -> bool:
    paragraphs = text.split("\n\n")
    count, place = sum(bool(paragraph.strip()) for paragraph in paragraphs), given["nth_paragraph"]
    words = paragraphs[place - 1].split() if place <= count else []
    if not words or count != given["num_paragraphs"]:
        return False
    return re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0].lower() == given["first_word"].lower()


def _postscript(text: str, given: Given) -> bool:
    marker = given["postscript_marker"]
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker))
    return bool(_found(pattern, text))


def _highlights(text: str, given: Given) -> bool:
    once, twice = re.findall(r"\*[^\n*]*\*", text), re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in (*once, *twice)) >= given["num_highlights"]


def _json(text: str, given: Given) -> bool:
    bare = re.sub(r"^```(json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(bare)
    except ValueError:
        return False
    return True


def _two(text: str, given: Given) -> bool:
    found = _whole(text.split("******"))
    return found is not None and len(found) == 2 and found[0] != found[1]


def _capitals(text: str, given: Given) -> bool:
    words = re.findall(r"[^\W_]+(?:[.&'-][^\W_]+)*", text)
    return _related(sum(map(str.isupper, words)), given, "capital_frequency", "capital_relation")


CHECKS: dict[str, Check] = {
    "keywords:existence": Check(
        lambda text, given: all(_found(word, text) for word in given["keywords"]), {"keywords": list}
    ),
    "keywords:frequency": Check(
        lambda text, given: _related(_found(given["keyword"], text), given, "frequency"),
        {"keyword": str, "frequency": int, "relation": str},
    ),
    "keywords:forbidden_words": Check(
        lambda text, given: not any(_found(rf"\b{word}\b", text) for word in given["forbidden_words"]),
        {"forbidden_words": list},
    ),
    "keywords:letter_frequency": Check(
        lambda text, given: _related(
            text.lower().count(given["letter"].lower()), given, "let_frequency", "let_relation"
        ),
        {"letter": str, "let_frequency": int, "let_relation": str},
    ),
    "length_constraints:number_sentences": Check(
        lambda text, given: _related(_found(r"[.!?](?=\s|$)", f"{text.rstrip()}."), given, "num_sentences"),
        {"num_sentences": int, "relation": str},
    ),
    "length_constraints:number_paragraphs": Check(_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": Check(
        lambda text, given: _related(_found(r"\w+", text), given, "num_words"),
        {"num_words": int, "relation": str},
    ),
    "length_constraints:nth_paragraph_first_word": Check(
        _first_word, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "detectable_content:number_placeholders": Check(
        lambda text, given: _found(r"\[.*?\]", text) >= given["num_placeholders"], {"num_placeholders": int}
    ),
    "detectable_content:postscript": Check(_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": Check(
        lambda text, given: _found(r"^\s*(?:\*[^*]|-).*$", text, re.MULTILINE) == given["num_bullets"],
        {"num_bullets": int},
    ),
    "detectable_format:constrained_response": Check(
        lambda text, given: any(option in text for option in OPTIONS)
    ),
    "detectable_format:number_highlighted_sections": Check(_highlights, {"num_highlights": int}),
    "detectable_format:multiple_sections": Check(
        lambda text, given: _found(rf"{given['section_spliter']}\s?\d+", text, 0) >= given["num_sections"],
        {"section_spliter": str, "num_sections": int},
    ),
    "detectable_format:json_format": Check(_json),
    "detectable_format:title": Check(
        lambda text, given: any(
            title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text)
        )
    ),
    "combination:two_responses": Check(_two),
    "combination:repeat_prompt": Check(
        lambda text, given: text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower()),
        {"prompt_to_repeat": str},
    ),
    "startend:end_checker": Check(
        lambda text, given: text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower()),
        {"end_phrase": str},
    ),
    "startend:quotation": Check(lambda text, given: bool(re.fullmatch(r'"(?s:.*)"', text.strip()))),
    "change_case:capital_word_frequency": Check(
        _capitals, {"capital_frequency": int, "capital_relation": str}
    ),
    "change_case:english_capital": Check(lambda text, given: text.isupper()),
    "change_case:english_lowercase": Check(lambda text, given: text.islower()),
    "punctuation:no_comma": Check(lambda text, given: "," not in text),
}
