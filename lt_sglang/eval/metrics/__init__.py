"""Published metrics: an answer's score between 0 and 1.

A metric takes the model's answer, the accepted answers and the item's details.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lt_sglang.eval.metrics import ifeval, longbench, mathematics

Metric = Callable[[str, Sequence[str], Mapping[str, Any]], float]


def begins(answer: str, accepted: Sequence[str], details: Mapping[str, Any]) -> float:
    """Whether the answer begins with an accepted one."""
    return float(any(answer.strip().startswith(text) for text in accepted))


def contains_all(answer: str, accepted: Sequence[str], details: Mapping[str, Any]) -> float:
    """Share of the references found in the answer, whatever the case (RULER's string_match_all)."""
    return sum(text.lower() in answer.lower() for text in accepted) / len(accepted)


def contains_any(answer: str, accepted: Sequence[str], details: Mapping[str, Any]) -> float:
    """Whether any of the references is found in the answer, whatever the case (RULER's string_match_part)."""
    return float(any(text.lower() in answer.lower() for text in accepted))


def contains_every(answer: str, accepted: Sequence[str], details: Mapping[str, Any]) -> float:
    """Whether all the references are found in the answer, whatever the case."""
    return float(all(text.lower() in answer.lower() for text in accepted))


def withholds(answer: str, accepted: Sequence[str], details: Mapping[str, Any]) -> float:
    """Whether none of the references is found in the answer, whatever the case."""
    return float(not any(text.lower() in answer.lower() for text in accepted))


METRICS: dict[str, Metric] = {
    "begins": begins,
    "contains-all": contains_all,
    "contains-any": contains_any,
    "contains-every": contains_every,
    "withholds": withholds,
    "qa-f1": longbench.best(longbench.qa_f1),
    "qa-f1-zh": longbench.best(longbench.qa_f1_zh),
    "rouge-l": longbench.best(longbench.rouge_l),
    "rouge-l-zh": longbench.best(longbench.rouge_l_zh),
    "classification": longbench.best(longbench.classification),
    "retrieval": longbench.best(longbench.retrieval),
    "count": longbench.best(longbench.count),
    "code-similarity": longbench.best(longbench.code_similarity),
    "choice": longbench.best(longbench.choice),
    "recall": longbench.best(longbench.recall),
    "ifeval": ifeval.follows,
    "gsm8k": mathematics.gsm8k,
    "math": mathematics.boxed,
    "aime": mathematics.aime,
}
