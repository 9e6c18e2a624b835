"""The parity part of run.py as a test; `python tests/gpu/run.py OUT` also measures speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_logprobs_within_bf16_noise(tmp_path: Path) -> None:
    """With lazy layers the error against float32 is that of stock SGLang without them; a full mask is not."""
    command = [sys.executable, str(Path(__file__).with_name("run.py")), str(tmp_path), "--only", "parity"]
    subprocess.run(command, check=True, timeout=900)
    found = json.loads((tmp_path / "report.json").read_text())["parity"]
    noise = found["stock"]
    for name in ("graph", "graph_again", "eager"):
        assert found[name]["mean"] <= 1.25 * noise["mean"], name
        assert found[name]["max"] <= 1.5 * noise["max"], name
    assert found["full_mask_control"]["mean"] > 4 * noise["mean"]
