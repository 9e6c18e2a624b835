"""The arguments of every preset, of the chart and of Ray, are accepted by ``lt-sglang doctor``.

This machine needs neither the model's files nor the preset's GPUs: whether requests fit into those GPUs'
memory, ``lt-sglang plan`` says, from the same arguments.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lt_sglang.planner.shapes import CONFIGS
from tests.engine.known_forms import FORMS, OWN_ARCHITECTURE, write_code

from .chart import VALUES, container, template
from .test_ray_config import SERVE_CONFIGS

pytestmark = pytest.mark.slow

# What the hub has; the doctor reads it for the layers, heads and features. QwQ's has code of its own.
HUB = {
    "Llama-3.3-70B-Instruct": {**CONFIGS["llama-3-70b"], "max_position_embeddings": 131072},
    "QwQ-32B-LightTransfer": {**CONFIGS["qwq-32b"], **FORMS[OWN_ARCHITECTURE]},
}
# What the doctor finds about this machine, and not about the arguments.
HERE = {"weights", "memory"}
GPU = "a100-80"  # that of every preset
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


def command(name: str, preset: str, folder: Path, *more: str) -> list[str]:
    """A command of ours with the preset's arguments, its model a folder with the config.json alone."""
    read, key = PRESETS[preset]
    arguments = read(key)
    (model,) = [arg for arg in arguments if arg.startswith("--model-path=")]
    folder /= Path(model.partition("=")[2]).name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HUB[folder.name]))
    if "auto_map" in HUB[folder.name]:
        write_code(folder)
    given = [f"--model-path={folder}" if arg == model else arg for arg in arguments]
    return [sys.executable, "-m", "lt_sglang", name, "--json", *more, *given]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_doctor_accepts_a_preset(preset: str, tmp_path: Path) -> None:
    done = subprocess.run(command("doctor", preset, tmp_path), capture_output=True, text=True, timeout=600)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    wrong = {name: check["message"] for name, check in checks.items() if not check["ok"] and name not in HERE}
    assert not wrong and {"configuration", "model", "flags"} <= checks.keys(), (wrong, done.stderr[-800:])


def test_the_doctor_itself(tmp_path: Path) -> None:
    """One argument that SGLang does not know, one that lazy layers do not work with."""
    for number, wrong in enumerate(("--tp-sizes=2", "--enable-mixed-chunk")):
        folder = tmp_path / str(number)
        folder.mkdir()
        asked = [*command("doctor", "ray/qwq-32b-tp2", folder), wrong]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=600)
        (flags,) = [check for check in json.loads(done.stdout) if check["name"] == "flags"]
        assert not flags["ok"] and wrong.partition("=")[0] in flags["message"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_gpus_have_room(preset: str, tmp_path: Path) -> None:
    """For a request of 16K + 1K tokens on each A100 80 GB of the preset."""
    length = ("--gpu", GPU, "--lengths", "16384", "--output-tokens", "1024")
    done = subprocess.run(command("plan", preset, tmp_path, *length), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    plan = json.loads(done.stdout)
    assert plan["lengths"][0]["hybrid_requests"] >= 8
