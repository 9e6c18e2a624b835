"""Run locust on a scenario written as a mapping, in a process of its own as an operator would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lt_sglang.bench import locustfile_path
from lt_sglang.bench.outcome import read_samples, read_summary

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """A finished run: its exit code, what it printed, and its folder."""

    code: int
    text: str
    out: Path

    @property
    def data(self) -> dict[str, Any]:
        """summary.json."""
        return read_summary(self.out)

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of all requests."""
        summary: dict[str, Any] = self.data["summary"]
        return summary

    @property
    def samples(self) -> list[dict[str, str]]:
        """The rows of samples.csv."""
        return read_samples(self.out)


def scenario(**changes: Any) -> dict[str, Any]:
    """A small scenario; ``changes`` replace top-level keys."""
    return {
        "name": "small",
        "about": "for tests",
        "load": {"kind": "closed", "users": 4, "requests": 8, "warmup": 0},
        "traffic": {"input": 8, "output": 6},
        **changes,
    }


def write(folder: Path, data: dict[str, Any]) -> Path:
    """The scenario as a file."""
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def run(url: str, data: dict[str, Any], folder: Path, limit_s: float = 120) -> Run:
    """Run it headless; raises if locust did not get as far as writing its files and should have."""
    out = folder / "out"
    command = [sys.executable, "-m", "locust", "-f", str(locustfile_path()), "--headless", "--only-summary"]
    command += ["--host", url, "--lt-scenario", str(write(folder, data)), "--lt-out", str(out)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s, check=False)
    return Run(done.returncode, done.stdout + done.stderr, out)


def dump(run_: Run) -> str:
    """What a failed assertion should show."""
    return run_.text[-3000:] + json.dumps(run_.data["first_errors"] if run_.out.exists() else [])
