"""Tests of Triton kernels under Triton's interpreter, in a process of their own.

Triton decides at its import whether kernels are interpreted. Set for the whole test run, the variable would
also reach the servers that other tests start, and tests on a GPU. So another pytest runs the files
``interpreted_*.py``, one process a file, and each of their test functions is told as a test here.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

TIMEOUT = 300


class Interpreted:
    """The outcome of one file.

    file: its name in this folder. folder: for the report.
    """

    def __init__(self, file: str, folder: Path) -> None:
        path = Path(__file__).with_name(file)
        report = folder / f"{path.stem}.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)]
            + [f"--junitxml={report}"],
            cwd=path.parents[2],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        self._said = done.stdout[-8000:] + done.stderr[-2000:]
        self._cases: dict[str, list[ElementTree.Element]] = defaultdict(list)
        if report.is_file():
            for case in ElementTree.parse(report).iter("testcase"):
                self._cases[str(case.get("name")).partition("[")[0]].append(case)

    def check(self, function: str) -> None:
        """Every case of a test function has passed. Raises AssertionError with what went wrong."""
        cases = self._cases[function]
        assert cases, f"{function} was not run\n{self._said}"
        wrong = [problem for case in cases for problem in case]
        assert not wrong, "\n".join(str(problem.text) for problem in wrong)


def functions(file: str) -> Iterator[str]:
    """The test functions of a file, without importing it."""
    tree = ast.parse(Path(__file__).with_name(file).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name


def parameters(*files: str) -> pytest.MarkDecorator:
    """Parametrize a test by file and function; one process of tests takes all of a file."""
    return pytest.mark.parametrize(
        ("file", "function"),
        [
            pytest.param(file, name, marks=pytest.mark.group(file), id=f"{Path(file).stem}-{name}")
            for file in files
            for name in functions(file)
        ],
    )
