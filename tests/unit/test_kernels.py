"""Every interpreted_*.py, function by function."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from .interpreted import Interpreted, functions, parameters

FOLDER = Path(__file__).parent
FILES = sorted(file.name for file in FOLDER.glob("interpreted_*.py") if any(functions(file.name)))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Interpreted]:
    """The outcome of a file, which is run once."""
    folder = tmp_path_factory.mktemp("interpreted")
    return cache(lambda file: Interpreted(file, folder))


@parameters(*FILES)
def test_under_the_interpreter(file: str, function: str, outcome: Callable[[str], Interpreted]) -> None:
    outcome(file).check(function)


def test_every_file_has_tests() -> None:
    assert {"interpreted_kernels.py", "interpreted_selection.py"} < set(FILES) and len(FILES) >= 4
