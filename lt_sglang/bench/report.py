"""One HTML page for a run, with its plots inside: it can be mailed."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from lt_sglang.bench.gates import Verdict
from lt_sglang.bench.samples import unit_of

TEMPLATE = "report.html.j2"


def html(data: dict[str, Any], verdicts: Sequence[Verdict], pictures: Sequence[Path]) -> str:
    """The page for ``data``, the content of summary.json."""
    source = (resources.files(__package__) / TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["figure"] = _figure
    environment.filters["unit"] = unit_of
    environment.filters["day"] = lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    images = [base64.b64encode(path.read_bytes()).decode() for path in pictures]
    return environment.from_string(source).render(**data, verdicts=verdicts, images=images)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
