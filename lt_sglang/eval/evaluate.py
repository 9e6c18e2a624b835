"""The same questions to several engines, and what the lightened ones lose against full attention."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.divergence import Divergence, divergence
from lt_sglang.eval.endpoint import Continued, Endpoint, Progress, silent
from lt_sglang.eval.intervals import (
    Interval,
    paired_means,
    paired_rates,
    sign_test,
    trials_needed,
    verdict,
    wilson,
)
from lt_sglang.eval.items import Item, Tokenizer
from lt_sglang.eval.metrics import METRICS

FEW_ITEMS = 20
# Their figure for all tasks is published as the mean over questions; that of others as the mean over tasks.
BY_QUESTIONS = ("LongBench v2", "LongMemEval")
Text = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Questions:
    """What every engine is asked.

    texts: (prompt, continuation) pairs for KL divergence and perplexity; a continuation's first token is
        given, so n + 1 tokens make n positions. top: log-probabilities asked for a position.
    """

    items: tuple[Item, ...]
    texts: tuple[Text, ...] = ()
    top: int = 256


@dataclass(frozen=True)
class Outcome:
    """What one engine answered. scores: each item's metric, between 0 and 1."""

    name: str
    info: Mapping[str, Any]
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    continued: tuple[Continued, ...]


@dataclass(frozen=True)
class Row:
    """One task of one engine against full attention.

    value, interval: the engine's own. full: full attention's value. difference: interval of value - full,
    over the same items. verdict: as lt_sglang.eval.intervals has it. notes: what else the metric says.
    """

    engine: str
    task: str
    metric: str
    items: int
    value: float
    interval: Interval | None
    full: float | None = None
    difference: Interval | None = None
    verdict: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    benchmark: str = ""

    @property
    def ratio(self) -> float | None:
        """value / full."""
        return self.value / self.full if self.full else None


def ask(
    endpoint: Endpoint,
    questions: Questions,
    tokenizer: Tokenizer,
    progress: Progress[Any] = silent,
) -> Outcome:
    """Put every question to one engine; raises LightTransferError."""
    info = endpoint.info()
    asked = [(item.prompt, item.new_tokens) for item in questions.items]
    answers = [tokenizer.decode(ids) for ids in endpoint.answers(asked, progress)]
    scores = [
        METRICS[item.metric](answer, item.answers, item.details)
        for item, answer in zip(questions.items, answers, strict=True)
    ]
    continued = endpoint.continued(questions.texts, questions.top, progress)
    return Outcome(endpoint.name, info, tuple(answers), tuple(scores), tuple(continued))


def compare(questions: Questions, outcomes: Sequence[Outcome], margin: float) -> list[Row]:
    """A row for each task and engine; the first engine is full attention.

    margin: the loss one would accept, a share of the items. Raises LightTransferError.
    """
    full = outcomes[0]
    rows = []
    for outcome in outcomes:
        base = None if outcome is full else full
        for label, picked in _tasks(questions).items():
            metric = questions.items[picked[0]].metric
            rows.append(_scores(_Group(label, metric, tuple(picked)), questions, outcome, base, margin))
        for group in _benchmarks(questions):
            rows.append(_scores(group, questions, outcome, base, margin))
        if questions.texts:
            rows += _texts(questions, outcome, base)
    return rows


def label_of(item: Item) -> str:
    """Task and length, as a row names them."""
    return f"{item.task} {item.cell['tokens']}" if "tokens" in item.cell else item.task


@dataclass(frozen=True)
class _Group:
    """The items of a row, by their numbers; strata: their tasks, if it is the mean over tasks."""

    label: str
    metric: str
    picked: tuple[int, ...]
    strata: tuple[str, ...] = ()


def _tasks(questions: Questions) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, item in enumerate(questions.items):
        found.setdefault(label_of(item), []).append(number)
    return found


def _benchmarks(questions: Questions) -> Iterator[_Group]:
    """All tasks of each benchmark, length by length, if there are several."""
    found: dict[tuple[str, Any], list[int]] = {}
    for number, item in enumerate(questions.items):
        found.setdefault((item.benchmark, item.cell.get("tokens")), []).append(number)
    for (benchmark, tokens), picked in found.items():
        tasks = tuple(label_of(questions.items[number]) for number in picked)
        if benchmark and len(set(tasks)) > 1:
            by_questions = benchmark in BY_QUESTIONS
            metric = questions.items[picked[0]].metric if by_questions else "mean of tasks"
            label = "all tasks" if tokens is None else f"all tasks {tokens}"
            yield _Group(label, metric, tuple(picked), () if by_questions else tasks)


def _mean(scores: Sequence[float], strata: Sequence[str]) -> float:
    if not strata:
        return statistics.fmean(scores)
    return statistics.fmean(
        statistics.fmean(score for score, of in zip(scores, strata, strict=True) if of == stratum)
        for stratum in dict.fromkeys(strata)
    )


def _scores(
    group: _Group, questions: Questions, outcome: Outcome, base: Outcome | None, margin: float
) -> Row:
    mine = [outcome.scores[n] for n in group.picked]
    theirs = [] if base is None else [base.scores[n] for n in group.picked]
    # Also a graded metric that was right or wrong each time, such as RULER's with one needle.
    binary = not group.strata and {*mine, *theirs} <= {0.0, 1.0}
    # Fewer, also of one task, are too few for a bootstrap, whose interval may then be empty.
    enough = binary or min(Counter(group.strata or ("",) * len(mine)).values()) >= FEW_ITEMS
    interval = wilson(sum(mine), len(mine)) if binary else None
    if not binary and enough:
        interval = paired_means([0.0] * len(mine), mine, group.strata)
    row = Row(
        outcome.name,
        group.label,
        group.metric,
        len(mine),
        _mean(mine, group.strata),
        interval,
        benchmark=questions.items[group.picked[0]].benchmark,
    )
    if base is None:
        return row
    notes: dict[str, Any] = {}
    if binary:
        first, second = [s == 1 for s in theirs], [s == 1 for s in mine]
        difference = paired_rates(first, second)
        notes["sign_test_p"] = sign_test(first, second)
    else:
        difference = paired_means(theirs, mine, group.strata)
    told = verdict(difference, margin) if enough else "cannot tell"
    if told == "cannot tell" and binary:
        notes["items_needed"] = trials_needed(first, second, margin)
    full = _mean(theirs, group.strata)
    return replace(row, full=full, difference=difference, verdict=told, notes=notes)


def divergences(full: Outcome, light: Outcome) -> list[Divergence]:
    """KL(full || light) of each text; raises LightTransferError if the engines saw different positions."""
    try:
        return [divergence(p.tops, q.tops) for p, q in zip(full.continued, light.continued, strict=True)]
    except ValueError as error:
        raise LightTransferError(f"{light.name}: {error}") from None


def _texts(questions: Questions, outcome: Outcome, base: Outcome | None) -> list[Row]:
    prompt, continuation = questions.texts[0]
    label = f"text {len(prompt)} + {len(continuation) - 1}"
    losses = [-statistics.fmean(text.logprobs) for text in outcome.continued]
    perplexity = Row(outcome.name, label, "perplexity", len(losses), math.exp(statistics.fmean(losses)), None)
    if base is None:
        return [perplexity]
    theirs = [-statistics.fmean(text.logprobs) for text in base.continued]
    loss = paired_means(theirs, losses)
    full = math.exp(statistics.fmean(theirs))
    found = divergences(base, outcome)
    kls = [text.mean for text in found]
    spread = paired_means([0.0] * len(kls), kls)
    told = "worse" if loss.low > 0 else "cannot tell" if loss.high > 0 else "no worse"
    return [
        replace(
            perplexity,
            full=full,
            difference=Interval(full * math.expm1(loss.low), full * math.expm1(loss.high)),
            verdict=told if len(losses) >= FEW_ITEMS else "cannot tell",
        ),
        Row(
            outcome.name,
            label,
            "KL, nats",
            len(kls),
            statistics.fmean(kls),
            spread,
            notes={
                "largest_position": max(text.largest for text in found),
                "probability_seen": statistics.fmean(text.seen for text in found),
            },
        ),
    ]
