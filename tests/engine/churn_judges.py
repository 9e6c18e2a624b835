"""Hold every answer of a churn against a reference run alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from .churn import ITEM, LABELS, PLACEHOLDER, Answer, Outcome
from .dynamic_reference import DynamicReference
from .reference import TIE_MARGIN, TOKENS_PER_TIE, Reference

# Two float32 engines may differ by so much in a probability.
SCORE_TOLERANCE = 1e-4


@dataclass
class Verdict:
    """What was compared, and what was wrong: (rid, what, details)."""

    requests: int = 0
    answers: int = 0
    copies: int = 0
    cut: int = 0
    scored: int = 0
    retractions: int = 0
    with_cached_prefix: int = 0
    versions: list[str] = field(default_factory=list)
    tokens: int = 0
    ties: int = 0
    wrong: list[tuple[str, str, str]] = field(default_factory=list)

    def assert_equal(self) -> None:
        """No mismatch; near-ties at most one in TOKENS_PER_TIE."""
        kinds: dict[str, int] = defaultdict(int)
        for _, what, _ in self.wrong:
            kinds[what] += 1
        assert not self.wrong, f"{len(self.wrong)} of {self.answers}: {dict(kinds)}; {self.wrong[:6]}"
        assert self.ties <= math.ceil(self.tokens / TOKENS_PER_TIE), f"{self.ties} of {self.tokens}"

    def as_json(self) -> dict[str, Any]:
        """For a file of results."""
        return asdict(self)


def judge_static(outcome: Outcome, references: Mapping[str, Reference]) -> Verdict:
    """Greedy tokens, and the probabilities of scored requests, of the weights each was served with."""
    verdict = _counted(outcome)
    for answer in outcome.answers:
        if answer.scores:
            _judge_scores(verdict, answer, references.values())
        elif answer.tokens:
            margins = references[answer.version].margins(answer.job.prompt, answer.tokens)
            _judge_margins(verdict, answer, margins)
    return verdict


def judge_dynamic(
    outcome: Outcome, references: Mapping[str, DynamicReference], *, listed: bool = False
) -> Verdict:
    """Greedy tokens, given the layers that each was told.

    Of a request that inherits, the queries that its prompt has in common with the decider's saw everything,
    the others streamed. The decider is known by its scores; one that was cut before it was told is not, and
    then any prompt may have been it. Scored requests are not told their layers: they disturb the others.
    Prompts of requests that were cut and said nothing count too.

    listed: all have the same layers, those of a list. Then full attention may end where the decider's prompt
        parted from one that came before.
    """
    verdict = _counted(outcome)
    deciders: dict[tuple[str, tuple[float, ...]], list[tuple[int, ...]]] = defaultdict(list)
    prompts: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    hits: dict[tuple[str, tuple[float, ...]], set[int]] = defaultdict(set)
    silent = {job.prompt for job in outcome.silent}
    for answer in outcome.answers:
        prompts[answer.version].add(answer.job.prompt)
        if answer.choice is not None and answer.choice["origin"] == "prefix":
            hits[answer.version, tuple(answer.choice["laziness"])].add(answer.cached)
        if answer.choice is not None and answer.choice["origin"] == "prompt":
            deciders[answer.version, tuple(answer.choice["laziness"])].append(answer.job.prompt)
    for answer in outcome.answers:
        if not answer.tokens:
            continue
        if answer.choice is None:
            verdict.wrong.append((answer.job.rid, "not told its layers", _describe(answer)))
            continue
        prompt, choice = answer.job.prompt, answer.choice
        reference = references[answer.version]
        everybody = prompts[answer.version] | silent
        if choice["origin"] == "default":
            candidates = {0}
        elif choice["origin"] == "prompt":
            candidates = {len(prompt), *(_common(prompt, other) for other in everybody if listed)}
        else:
            known = deciders.get((answer.version, tuple(choice["laziness"]))) if not listed else None
            candidates = {_common(prompt, other) for other in known or everybody}
            # Whoever found less of it cached computed the rest with streaming attention, also for those that
            # came after it.
            earlier = hits[answer.version, tuple(choice["laziness"])]
            candidates |= {hit for hit in earlier if hit <= answer.cached}
        ways = _ways(reference, answer, candidates)
        if answer.job.copies > 1 and choice["origin"] == "prefix":
            # SGLang sends such a request once ahead, which is told nothing: how much it found is not known.
            ways = chain(ways, _ways(reference, answer, set(range(answer.cached)) - candidates))
        _judge_margins(verdict, answer, _best(ways))
    return verdict


def _best(ways: Iterable[list[float]]) -> list[float]:
    """The first way that misses nothing, else the one that misses least."""
    best: list[float] | None = None
    for margins in ways:
        if best is None or max(margins) < max(best):
            best = margins
        if max(best) < TIE_MARGIN:
            break
    assert best is not None
    return best


def _ways(reference: DynamicReference, answer: Answer, candidates: Collection[int]) -> Iterator[list[float]]:
    """By how much each token misses, for every way in which its prompt may have been computed.

    A prefix that a request reads may be longer than what it may take from the cache: it computes at least
    its last token itself. When its first tokens are decoded, SGLang may have freed that row for the tree's,
    or not yet: with overlap the next step is launched before.
    """
    assert answer.choice is not None
    prompt, lazy = answer.job.prompt, answer.choice["lazy_layers"]
    inherits = answer.choice["origin"] == "prefix"
    for full in sorted(candidates, reverse=True):
        if inherits and answer.cached < full:
            for steps in (0, 1):
                yield reference.margins_of_hit(prompt, answer.tokens, lazy, answer.cached, full, steps)
        else:
            yield reference.margins(prompt, answer.tokens, lazy, full)


def _counted(outcome: Outcome) -> Verdict:
    answers = outcome.answers
    return Verdict(
        requests=len({answer.job.rid for answer in answers}) + len(outcome.failed),
        answers=len(answers),
        copies=sum(answer.job.copies > 1 for answer in answers),
        cut=sum(answer.job.cut for answer in answers),
        scored=sum(bool(answer.scores) for answer in answers),
        retractions=sum(answer.retractions for answer in answers),
        with_cached_prefix=sum(answer.cached > 0 for answer in answers),
        versions=sorted({answer.version for answer in answers if answer.version}),
        wrong=[(rid, "failed", why) for rid, why in outcome.failed],
    )


def _judge_margins(verdict: Verdict, answer: Answer, margins: Sequence[float]) -> None:
    verdict.tokens += len(margins)
    first = next((i for i, margin in enumerate(margins) if margin >= TIE_MARGIN), None)
    # A near-tie that is lost is a tie; what follows it is teacher-forced, so it counts by itself.
    verdict.ties += sum(0 < margin < TIE_MARGIN for margin in margins)
    if first is not None:
        what = "n > 1" if answer.job.copies > 1 else "retracted" if answer.retractions else "tokens"
        verdict.wrong.append(
            (answer.job.rid, what, f"token {first} by {margins[first]:.3g}, {_describe(answer)}")
        )


def _judge_scores(verdict: Verdict, answer: Answer, references: Collection[Reference]) -> None:
    """The answer does not say which weights: those of one version must give all of its probabilities."""
    tokens = [*answer.job.prompt, ITEM]
    vectors = dict(
        zip((i for i, t in enumerate(tokens) if t == PLACEHOLDER), answer.job.embeds, strict=False)
    )
    worst = []
    for reference in references:
        expected = reference.next_probabilities(tokens, vectors)
        worst.append(max(abs(expected[t] - s) for t, s in zip(LABELS, answer.scores, strict=True)))
    if min(worst) > SCORE_TOLERANCE:
        verdict.wrong.append((answer.job.rid, "embeds", f"probabilities differ by {min(worst):.3g}"))


def _describe(answer: Answer) -> str:
    job = answer.job
    told = {} if answer.choice is None else {k: answer.choice[k] for k in ("origin", "lazy_layers")}
    return (
        f"prompt of {len(job.prompt)}, {len(answer.tokens)} new, cached {answer.cached}, retracted "
        f"{answer.retractions} times, weights {answer.version}, n {job.copies}, priority {job.priority}"
        f", {told}"
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return [*(a == b for a, b in zip(one, other, strict=False)), False].index(False)
