"""What a comparison found, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lt_sglang.eval.evaluate import Outcome, Questions, Row
from lt_sglang.eval.intervals import Interval

HEADER = (
    "engine",
    "task",
    "metric",
    "items",
    "value",
    "95 %",
    "full",
    "ratio",
    "difference, 95 %",
    "verdict",
)


def table(rows: Sequence[Row]) -> str:
    """One line a row, columns aligned."""
    return aligned([HEADER, *map(_cells, rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The cells of a table, head first, as text with its columns aligned."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_dict(
    settings: dict[str, Any], questions: Questions, outcomes: Sequence[Outcome], rows: Sequence[Row]
) -> dict[str, Any]:
    """Everything: settings, engines, rows and each single answer."""
    return {
        "settings": settings,
        "engines": {outcome.name: dict(outcome.info) for outcome in outcomes},
        "rows": [_row(row) for row in rows],
        "items": [
            {
                "task": item.task,
                **item.cell,
                "accepted": list(item.answers),
                "answers": {outcome.name: outcome.answers[n] for outcome in outcomes},
                "scores": {outcome.name: outcome.scores[n] for outcome in outcomes},
            }
            for n, item in enumerate(questions.items)
        ],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        **{
            name: getattr(row, name)
            for name in ("engine", "task", "metric", "items", "value", "full", "ratio")
        },
        "interval": _pair(row.interval),
        "difference": _pair(row.difference),
        "verdict": row.verdict,
        **row.notes,
    }


def _pair(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _cells(row: Row) -> tuple[str, ...]:
    needed = row.notes.get("items_needed")
    return (
        row.engine,
        row.task,
        row.metric,
        str(row.items),
        _number(row.value),
        _range(row.interval),
        "" if row.full is None else _number(row.full),
        "" if row.ratio is None else f"{row.ratio:.3f}",
        _range(row.difference, sign="+"),
        f"{row.verdict}: needs about {needed} items" if needed else row.verdict,
    )


def _number(value: float, sign: str = "") -> str:
    small = 0 < abs(value) < 0.01
    return f"{value:{sign}.2e}" if small else f"{value:{sign}.3f}"


def _range(interval: Interval | None, sign: str = "") -> str:
    return "" if interval is None else f"{_number(interval.low, sign)} to {_number(interval.high, sign)}"
