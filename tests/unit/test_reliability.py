"""docs/reliability.md: every row names a test, and every test named exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[str]:
    """The lines of all tables, without their heads."""
    lines = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|") and not line.startswith(("| fault |", "|---"))]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.split("|")[1].strip())
def test_every_row_names_tests_that_exist(row: str) -> None:
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == 5 and all(cells), "fault, how it is made, what is promised, what happened, test"
    named = NAMED.findall(cells[-1])
    assert named, f"no test is named in {cells[-1]!r}"
    for file, function in named:
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in found and function.startswith("test_"), f"{file} has no test {function}"


def test_slow_tests_are_told_as_such() -> None:
    """Who reads the table should know which command makes a fault."""
    for row in rows():
        for file, function in NAMED.findall(row):
            source = (REPOSITORY / file).read_text(encoding="utf-8")
            before = source.split(f"def {function}(")[0].rsplit("\n\n\n", 1)[-1]
            if "pytest.mark.slow" in before:
                assert "(slow" in row, f"{function} is slow, and its row does not say so"


def test_there_are_rows() -> None:
    assert len(rows()) >= 12
