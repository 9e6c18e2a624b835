"""Every interpreted_*.py, function by function."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import lt_sglang

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


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int) -> None:
    """With the arguments it gets; needs no GPU."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "compiled_kernels.py"), str(capability)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours = Path(lt_sglang.__file__).parent
    sources = [file.read_text(encoding="utf-8") for file in ours.rglob("*.py")]
    launched = {name for source in sources for name in re.findall(r"^ +(_\w+)\[.*\]\(\n", source, re.M)}
    assert launched == set(re.findall(r"^COMPILED (\w+)$", done.stdout, re.M)) and len(launched) > 12


def test_every_file_has_tests() -> None:
    assert {"interpreted_kernels.py", "interpreted_selection.py"} < set(FILES) and len(FILES) >= 4
