"""Two processes train as one does; weights sharded as a run shards them; QwQ's recipe, on a tiny model.

On a CPU accelerate gives each process all weights (DDP). So how FSDP2 shards them is tested with torch alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loadtest.experiments.train_fsdp import write_data
from lt_sglang.train.options import read_recipe
from lt_sglang.train.trainer import sharding_policy
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


def steps(model: torch.nn.Module, rank: int, ranks: int) -> list[float]:
    """Losses of AdamW under autocast, in bfloat16; each of ``ranks`` takes its share of two rows a step."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    losses = []
    for _ in range(20):
        rows = torch.randint(3, 500, (2, 1, 128), generator=generator)
        mine = rows[rank::ranks]
        mean = torch.zeros(())
        for row in mine:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(row, labels=row, use_cache=False).loss.float() / len(mine)
            loss.backward()
            mean += loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(mean))
    return losses


def tiny_model() -> torch.nn.Module:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(ensure_model("llama"), dtype=torch.float32)


def sharded(rank: int, store: str, gather: str, out: str) -> None:
    """One of two processes; the first writes its losses."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, mesh, policy = tiny_model(), init_device_mesh("cpu", (2,)), sharding_policy(gather)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    found = steps(model, rank, 2)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def test_sharded_weights_gathered_in_float32_train_as_one_process_does(tmp_path: Path) -> None:
    """In bfloat16 they do not: another first loss, and several times further off after twenty steps."""
    one = steps(tiny_model(), 0, 1)
    worst = {}
    for gather in ("float32", "bfloat16"):
        out = tmp_path / f"{gather}.json"
        mp.spawn(sharded, (str(tmp_path / f"store-{gather}"), gather, str(out)), nprocs=2)
        found = json.loads(out.read_text())
        assert (found[0] == pytest.approx(one[0], rel=1e-6)) == (gather == "float32")
        worst[gather] = max(abs(a / b - 1) for a, b in zip(found, one, strict=True))
    assert worst["float32"] < 0.002 < worst["bfloat16"], worst


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
