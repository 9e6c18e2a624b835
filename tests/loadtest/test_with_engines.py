"""lt-sglang bench and lt-sglang soak on real servers, tiny ones on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .runs import REPOSITORY

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SCENARIOS = REPOSITORY / "loadtest" / "scenarios"


def command(folder: Path, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Run ``lt-sglang`` as from a shell; exit code, output, result files."""
    options = ["--work", str(folder / "work"), "--out", str(folder / "out"), "--date", "2026-01-02"]
    done = subprocess.run(
        [sys.executable, "-m", "lt_sglang", *arguments, *options],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    files = sorted((folder / "out").glob("*.json"))
    return done.returncode, done.stdout, [json.loads(file.read_text()) for file in files]


def test_bench(tmp_path: Path) -> None:
    file = str(SCENARIOS / "cpu.yaml")
    case = ("--case", "memory-full", "--rounds", "1", "--overlap-starts")
    code, text, results = command(tmp_path, "bench", file, *case)
    assert code == 0, text
    (result,) = results
    assert result["scenario"] == "tiny-memory-full"
    base, ours = result["baseline"], result["lighttransfer"]
    assert base["engine"] == "stock_torch_native" and ours["config"]["lazy_layers"] == "2-5"
    assert base["errors"] == ours["errors"] == 0
    assert base["total_output_tokens"] == ours["total_output_tokens"] == 24 * 64
    # The same memory holds more requests, as many as the planner says.
    assert result["ratio"]["requests_running"] == pytest.approx(result["bound"]["requests_running"], rel=0.15)
    assert ours["requests_running"] > base["requests_running"]
    kv = [side["memory"]["server"]["kvcache"] for side in (base, ours)]
    assert kv[1] <= 1.05 * kv[0]


def test_soak(tmp_path: Path) -> None:
    """A minute is too short to judge speed and memory; errors and what is left are judged."""
    _, text, results = command(
        tmp_path, "soak", str(SCENARIOS / "soak.yaml"), "--case", "cpu", "--seconds", "60"
    )
    (result,) = results
    soak = result["soak"]
    assert soak["passed"]["errors"] and soak["passed"]["nothing_left"], text
    assert soak["summary"]["completed"] > 50 and soak["summary"]["aborted"] > 5
    assert len(soak["parts"]) == 6 and all(part["tokens_per_cpu_second"] > 0 for part in soak["parts"])
