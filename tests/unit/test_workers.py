"""tests/workers.py, tests/conftest.py: how many tests run at once, what stays together, what is passed on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import workers
from tests.engine.environment import server_environment

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine of so many cores and GiB of free memory, without limits of a container."""

    def make(cores: int, gibibytes: int) -> Path:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        free = psutil.virtual_memory()._replace(available=gibibytes << 30)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("cores", "memory", "expected"), [(2, 22, 2), (1, 64, 0), (2, 12, 0), (4, 20, 2), (64, 500, 8)]
)
def test_as_many_as_cores_and_memory_allow(cores: int, memory: int, expected: int, machine) -> None:
    assert workers.workers(machine(cores, memory)) == expected


def test_the_limits_of_a_container_count(machine) -> None:
    folder = machine(64, 500)
    (folder / "cpu.max").write_text("300000 100000\n")
    assert workers.workers(folder) == 3
    (folder / "memory.max").write_text(f"{20 << 30}\n")
    (folder / "memory.current").write_text(f"{3 << 30}\n")
    assert workers.workers(folder) == 2
    (folder / "cpu.max").write_text("max 100000\n")
    (folder / "memory.max").write_text("max\n")
    assert workers.workers(folder) == 8


TESTS = """
import os, pytest

@pytest.mark.parametrize("number", range(6))
def test_alone(number, record_property):
    record_property("seed", 40 + number)
    record_property("process", os.getpid())

@pytest.mark.group("pair")
def test_first(): print("process", os.getpid()); open({out!r}, "a").write(f"{{os.getpid()}} ")

@pytest.mark.group("pair")
def test_second(): open({out!r}, "a").write(f"{{os.getpid()}} ")
"""


def test_groups_stay_in_one_process_and_seeds_are_printed(tmp_path: Path) -> None:
    """A run of pytest of its own, over files that use this repository's conftest."""
    folder, out = tmp_path / "tests", tmp_path / "out"
    folder.mkdir()
    for name in ("conftest.py", "workers.py", "__init__.py"):
        (folder / name).write_text((REPOSITORY / "tests" / name).read_text())
    for letter in "abc":
        (folder / f"test_{letter}.py").write_text(TESTS.format(out=str(out)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-v", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 passed" in done.stdout.splitlines()[-1], "the last line is pytest's own"
    assert len(set(out.read_text().split())) == 1, "six tests of one group"
    assert "seed 43: tests/test_b.py::test_alone[3]" in done.stdout
    seen = {line.split("]")[0] for line in done.stdout.splitlines() if line.startswith("[gw")}
    assert seen == {"[gw0", "[gw1"}


def test_servers_inherit_instruction_sets_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``make test ATEN_CPU_CAPABILITY=avx2`` sets reaches torch in a server's process."""
    for name, value in (("ATEN_CPU_CAPABILITY", "default"), ("ONEDNN_MAX_CPU_ISA", "AVX2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    code = "import os, torch; print(torch.backends.cpu.get_cpu_capability()); "
    code += "print(os.environ['OMP_NUM_THREADS'], os.environ['ONEDNN_MAX_CPU_ISA'])"
    env = server_environment()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["DEFAULT", "3", "AVX2"]


def test_make_passes_its_variables_on() -> None:
    """A variable on make's command line is in the environment of what make runs."""
    rule = "include Makefile\nshown:\n\t@echo $$ATEN_CPU_CAPABILITY $$OMP_NUM_THREADS\n"
    command = ["make", "-s", "-f", "-", "shown", "ATEN_CPU_CAPABILITY=avx2"]
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        command, input=rule, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["avx2", "2"]
