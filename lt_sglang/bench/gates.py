"""Limits on a summary; a run that breaks one ends with exit code 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lt_sglang.bench.scenario import Gate


@dataclass(frozen=True)
class Verdict:
    """A gate and what was measured; passed: within its limits. A figure that is missing fails."""

    gate: Gate
    value: float | None
    passed: bool

    def __str__(self) -> str:
        given = (">=", self.gate.min), ("<=", self.gate.max)
        limits = [f"{sign} {limit:g}" for sign, limit in given if limit is not None]
        shown = "nothing" if self.value is None else f"{self.value:.4g}"
        word = "PASS" if self.passed else "FAIL"
        return f"{word} {self.gate.metric} {' and '.join(limits)}: {shown}"


def judge(gates: Sequence[Gate], summary: Mapping[str, float | None]) -> list[Verdict]:
    """One verdict a gate. No error is allowed unless a gate says how many; nothing answered always fails."""
    if not {"errors", "error_rate"} & {gate.metric for gate in gates}:
        gates = [*gates, Gate("errors", max=0)]
    verdicts = [Verdict(gate, summary[gate.metric], _within(gate, summary[gate.metric])) for gate in gates]
    if not summary["completed"]:
        verdicts.append(Verdict(Gate("completed", min=1), 0, False))
    return verdicts


def _within(gate: Gate, value: float | None) -> bool:
    if value is None:
        return False
    return (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
