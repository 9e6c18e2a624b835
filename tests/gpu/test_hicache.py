"""A 16K prefix comes back from pinned host memory as it was, in about the time that its bytes take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.experiments.host_cache import COPY_BOUND, GPU, ROOT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_prefixes_come_back(mode: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest.experiments.host_cache", str(tmp_path), "--only", mode]
    subprocess.run(
        [*command, "--rounds", "1"], cwd=ROOT, timeout=900
    )  # a missed bar of time is its exit code
    told = json.loads((tmp_path / "report.json").read_text())["engines"][mode]["summary"]
    assert told["cached_from_host"] >= GPU.tokens - 16
    found, asked = told["same_output_as_from_the_device"].split(" of ")
    assert found == asked
    assert told["copy_over_bound"] <= COPY_BOUND
