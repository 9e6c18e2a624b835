"""Two processes that share the weights (FSDP2, gloo) train as one does; QwQ's recipe, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loadtest.experiments.train_fsdp import write_data
from lt_sglang.train.options import read_recipe
from tests.engine.models import ensure_model

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6

pytestmark = pytest.mark.slow


def train(out: Path, data: Path, *more: str) -> list[float]:
    """Losses of a run in processes of its own."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "lt_sglang",
        "train",
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    command += ["--model-path", str(ensure_model("qwen2")), "--device", "cpu", "--precision", "float32"]
    command += ["--max-length", "256", "--learning-rate", "1e-3", "--no-plots", *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [entry["loss"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry]


def test_two_processes_as_one(tmp_path: Path) -> None:
    """The same rows a step in the same order: the same losses and weights; and two go on where they were."""
    data = tmp_path / "data.jsonl"
    write_data(data, 24, 300)
    lists = ("--lt-lazy-layers", "1,3", "--lt-recent-tokens", "60", "--no-packing")
    steps = ("--max-steps", str(STEPS), "--save-steps", str(STEPS // 2))
    one = train(tmp_path / "one", data, *lists, *steps, "--accumulate", "2")
    two = train(tmp_path / "two", data, *lists, *steps, "--gpus", "2")
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=1e-2)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    before = load_file(ensure_model("qwen2") / "model.safetensors")
    for name, tensor in weights[0].items():
        moved = (tensor - before[name]).abs().max()
        assert (weights[1][name] - tensor).abs().max() <= 0.1 * moved + 1e-6, name
    assert any(not torch.equal(weights[0][name], before[name]) for name in before)
    (tmp_path / "two" / "log.json").unlink()
    last = tmp_path / "two" / "checkpoints" / f"checkpoint-{STEPS}"
    last.rename(tmp_path / "gone")
    again = train(tmp_path / "two", data, *lists, *steps, "--gpus", "2", "--resume")
    assert again == pytest.approx(two, rel=1e-3)


def test_qwqs_recipe(tmp_path: Path) -> None:
    """The ready file, with fewer layers and tokens and two processes instead of eight."""
    recipe = read_recipe("qwq-32b")
    recipe |= {"lighttransfer": {"lazy_layers": "1,3,5", "sink_tokens": 12, "recent_tokens": 40}}
    recipe |= {"gpus": 2, "max_length": 256, "save_steps": 2, "epochs": 1}
    del recipe["model_path"]
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(recipe))
    data = tmp_path / "thoughts.jsonl"
    thought = "<|begin_of_thought|>{}<|end_of_thought|><|begin_of_solution|>4<|end_of_solution|>"
    lines = [
        {"question": "2+2?", "combined_text": thought.format("so " * n), "domain": "math"}
        for n in (9, 30, 50)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines * 8))
    losses = train(tmp_path / "out", data, "--recipe", str(path))
    assert losses and losses[-1] < losses[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["lighttransfer"]["lazy_layers"] == "1,3,5"
    assert json.loads((tmp_path / "out" / "data.json").read_text())["training"]["domains"] == {"math": 24}
