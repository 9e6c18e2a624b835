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
    """One line a row, columns aligned; a table for each benchmark, under its name."""
    return "\n\n".join(
        "\n".join([*([name] if name else []), aligned([HEADER, *map(_cells, some)])])
        for name, some in _benchmarks(rows).items()
    )


def markdown(rows: Sequence[Row]) -> str:
    """A table for each benchmark, tasks by engines: a value, and the interval of its difference from full."""
    parts = []
    for name, some in _benchmarks(rows).items():
        engines = list(dict.fromkeys(row.engine for row in some))
        cells = {(row.task, row.metric, row.engine): row for row in some}
        lines = [("task", "metric", "items", *engines), ("---",) * (3 + len(engines))]
        for task, metric in dict.fromkeys((row.task, row.metric) for row in some):
            found = [cells.get((task, metric, engine)) for engine in engines]
            items = next(str(row.items) for row in found if row)
            lines.append((task, metric, items, *(map(_brief, found))))
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{name}**\n\n{text}" if name else text)
    return "\n\n".join(parts)


def _benchmarks(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {
        name: [r for r in rows if r.benchmark == name] for name in dict.fromkeys(r.benchmark for r in rows)
    }


def _brief(row: Row | None) -> str:
    if row is None:
        return ""
    interval = row.interval if row.difference is None else row.difference
    told = _range(interval, "" if row.difference is None else "+")
    return f"{_number(row.value)} ({told})" if told else _number(row.value)


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
                "benchmark": item.benchmark,
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
            for name in ("engine", "benchmark", "task", "metric", "items", "value", "full", "ratio")
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
