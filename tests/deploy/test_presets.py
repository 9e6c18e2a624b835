"""The arguments of every preset, of the chart and of Ray, are accepted by ``lt-sglang doctor``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lt_sglang.planner.shapes import CONFIGS

from .chart import VALUES, container, template
from .test_ray_config import SERVE_CONFIGS

pytestmark = pytest.mark.slow

# What the hub has; the doctor reads it for the layers, heads and features.
HUB = {
    "Llama-3.3-70B-Instruct": {**CONFIGS["llama-3-70b"], "max_position_embeddings": 131072},
    "QwQ-32B-LightTransfer": CONFIGS["qwq-32b"],
}
# Filled in by Kubernetes for one node of a group.
GROUP = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_WORKER_INDEX)": "0", "$(LWS_LEADER_ADDRESS)": "127.0.0.1"}


def chart_arguments(name: str) -> list[str]:
    (engines,) = [
        item
        for item in template(values=name)
        if item["kind"] in ("Deployment", "LeaderWorkerSet") and item["metadata"]["name"].endswith("-engine")
    ]
    if engines["kind"] == "Deployment":
        args = container(engines)["args"]
    else:
        leader = engines["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
        args = leader["spec"]["containers"][0]["args"]
    for variable, value in GROUP.items():
        args = [arg.replace(variable, value) for arg in args]
    return [str(arg) for arg in args[1:]]


def ray_arguments(name: str) -> list[str]:
    from deploy.ray.engine import engine_arguments
    from deploy.ray.settings import Settings

    return engine_arguments(Settings.from_dict(SERVE_CONFIGS[name]["applications"][0]["args"]))


PRESETS = {
    **{f"chart/{name}": (chart_arguments, name) for name in VALUES},
    **{f"ray/{name}": (ray_arguments, name) for name in SERVE_CONFIGS},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_doctor_accepts_a_preset(preset: str, tmp_path: Path) -> None:
    read, name = PRESETS[preset]
    arguments = read(name)
    (model,) = [arg for arg in arguments if arg.startswith("--model-path=")]
    folder = tmp_path / Path(model.partition("=")[2]).name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HUB[folder.name]))
    given = [f"--model-path={folder}" if arg == model else arg for arg in arguments]
    command = [sys.executable, "-m", "lt_sglang", "doctor", "--json", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    # The model's files are not here.
    wrong = {n: check["message"] for n, check in checks.items() if not check["ok"] and n != "weights"}
    assert not wrong and {"configuration", "model", "flags"} <= checks.keys(), (wrong, done.stderr[-800:])
