"""The requests of a scenario, in order, from its seed: the same for every server it is sent to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np

from lt_sglang.bench import traces
from lt_sglang.bench.scenario import Length, Scenario, Traffic

# Token ids of prompts: in every vocabulary, and above the special tokens of all but a few.
TOKEN_IDS = (16, 500)


@dataclass(frozen=True)
class Turn:
    """What one request adds to its conversation, and how much it asks for.

    abort_after: give up after so many tokens; None: read to the end.
    """

    added: tuple[int, ...]
    output_tokens: int
    abort_after: int | None = None


@dataclass(frozen=True)
class Conversation:
    """One or more turns; ``at``: seconds after the start, in open loop. think_seconds: between turns.

    phase: the number of the load's phase in which it is sent.
    """

    index: int
    kind: str
    at: float
    turns: tuple[Turn, ...]
    think_seconds: float = 0.0
    phase: int = 0


def conversations(scenario: Scenario, seed: int | None = None) -> Iterator[Conversation]:
    """Endless conversations of ``scenario``; a trace that ends begins again, with other text."""
    seed = scenario.seed if seed is None else seed
    rng, text = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    weights = np.array([kind.weight for kind in scenario.traffic])
    sources = [_Source(kind, seed + 1 + number) for number, kind in enumerate(scenario.traffic)]
    at = 0.0
    for index in count():
        if scenario.load.period is not None and index % scenario.load.period == 0:
            rng = np.random.default_rng(seed)
        source = sources[rng.choice(len(sources), p=weights / weights.sum())]
        when, parts = source.draw(rng, text)
        turns = tuple(Turn(added, out, _abort(scenario, out, rng)) for added, out in parts)
        if scenario.load.kind == "poisson":
            at += rng.exponential(1 / scenario.load.rate)
        elif scenario.load.kind == "trace":
            at = when
        yield Conversation(index, source.kind.name, at, turns, source.kind.think_seconds)


class _Source:
    """Draws the turns of one kind of traffic."""

    def __init__(self, kind: Traffic, seed: int) -> None:
        self.kind = kind
        self._seed = seed
        self._prefixes = [
            _tokens(seed, number, kind.shared.tokens) if kind.shared else ()
            for number in range(kind.shared.prefixes if kind.shared else 1)
        ]
        self._rows = _trace_rows(kind, seed) if kind.trace else None

    def draw(
        self, rng: np.random.Generator, text: np.random.Generator
    ) -> tuple[float, list[tuple[tuple[int, ...], int]]]:
        """The arrival time a trace gives (else 0), and each turn's added tokens and output length.

        rng: for lengths. text: for tokens.
        """
        if self._rows is not None:
            return self._from_trace(text)
        assert self.kind.input is not None and self.kind.output is not None
        parts = []
        for turn in range(self.kind.turns):
            added = _random_tokens(text, sample(self.kind.input, rng))
            if turn == 0:
                added = self._prefixes[rng.integers(len(self._prefixes))] + added
            parts.append((added, sample(self.kind.output, rng)))
        return 0.0, parts

    def _from_trace(self, text: np.random.Generator) -> tuple[float, list[tuple[tuple[int, ...], int]]]:
        assert self._rows is not None and self.kind.trace is not None
        epoch, row = next(self._rows)
        trace = self.kind.trace
        wanted = min(trace.longest, max(1, round(row.input_tokens * trace.length_scale)))
        block = max(1, round(traces.BLOCK_TOKENS * trace.length_scale))
        tokens: tuple[int, ...] = ()
        for number in row.blocks[: -(-wanted // block)]:
            tokens += _tokens(self._seed + epoch, number, block)
        tokens = tokens[:wanted] + _random_tokens(text, max(0, wanted - len(tokens)))
        output = min(trace.longest_output, max(1, round(row.output_tokens * trace.length_scale)))
        return row.at / trace.speed, [(tokens, output)]


def _trace_rows(kind: Traffic, seed: int) -> Iterator[tuple[int, traces.Row]]:
    assert kind.trace is not None
    path = Path(kind.trace.path)
    shift = 0.0
    for epoch in count():
        last = 0.0
        for row in traces.rows(kind.trace.source, path, seed):
            last = row.at
            yield epoch, traces.Row(row.at + shift, row.input_tokens, row.output_tokens, row.blocks)
        shift += last


def sample(length: Length, rng: np.random.Generator) -> int:
    """One length of the distribution."""
    if length.kind == "lognormal":
        drawn = rng.lognormal(np.log(length.median), length.sigma)
        return int(min(max(round(drawn), length.low), length.high))
    return int(rng.integers(length.low, length.high + 1))


def _abort(scenario: Scenario, output_tokens: int, rng: np.random.Generator) -> int | None:
    if rng.random() >= scenario.aborts.share:
        return None
    return min(scenario.aborts.after_tokens, output_tokens)


def _random_tokens(rng: np.random.Generator, number: int) -> tuple[int, ...]:
    return tuple(rng.integers(*TOKEN_IDS, number).tolist())


@lru_cache(maxsize=4096)
def _tokens(seed: int, number: int, length: int) -> tuple[int, ...]:
    """The text with ``number``: always the same for a seed."""
    return _random_tokens(np.random.default_rng((seed, number)), length)


def as_text(tokens: Sequence[int]) -> str:
    """Numbers in place of token ids: for endpoints that take text only."""
    return " ".join(map(str, tokens))
