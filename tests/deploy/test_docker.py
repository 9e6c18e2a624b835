"""Image and compose file, as far as can be checked without a Docker daemon."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))

ARGS = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
STAGES = {name: text for name, text in re.findall(r"(?ms)^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE)}


def test_bases_are_pinned_by_digest() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert set(bases) == {f"${{{name}}}" for name in ARGS}
    for image in ARGS.values():
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image)


@pytest.mark.parametrize("stage", ["engine", "gateway"])
def test_nothing_runs_as_root(stage: str) -> None:
    users = re.findall(r"^USER (\S+)", STAGES[stage], re.MULTILINE)
    assert users == ["10001:10001"]
    after = STAGES[stage].split("USER 10001")[1]
    assert "RUN" not in after and "COPY" not in after


def test_user_is_the_charts() -> None:
    names = (ROOT / "k8s/charts/lt-sglang/templates/_names.tpl").read_text(encoding="utf-8")
    assert "runAsUser: 10001" in names


def test_build_tools_stay_behind() -> None:
    engine = STAGES["engine"]
    assert not re.search(r"\b(devel|nvcc|g\+\+|git|ninja|cmake|make)\b", re.sub(r"#.*", "", engine))
    assert all(
        "rm -rf /var/lib/apt/lists/*" in run
        for run in re.findall(r"apt-get update.*?(?=\n[A-Z])", engine, re.S)
    )


def test_what_is_copied_exists_and_is_in_the_context() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    for copied in re.findall(r"^COPY (?:--chmod=\d+ )?(?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in copied.split():
            assert (ROOT / source).exists(), source
            assert any(source == path or source.startswith(path + "/") for path in allowed), source


def test_lock_has_the_pinned_engine() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert {item for item in project["dependencies"] if "==" in item} <= set(lock)
    gateway = (DOCKER / "gateway.lock").read_text(encoding="utf-8").splitlines()
    assert "sglang-router==0.3.2" in gateway
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in gateway[1:])


def test_entrypoint_becomes_the_program(tmp_path: Path) -> None:
    """Arguments of the chart start lt-sglang; other words are a command of their own."""
    tool = tmp_path / "lt-sglang"
    tool.write_text('#!/bin/sh\necho "lt-sglang $* $FLASHINFER_WORKSPACE_BASE"\n')
    tool.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LT_CACHE": str(tmp_path / "cache")}

    def run(*arguments: str) -> str:
        command = ["sh", str(DOCKER / "entrypoint.sh"), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()

    assert run("serve", "--tp-size=4") == f"lt-sglang serve --tp-size=4 {tmp_path}/cache/flashinfer"
    assert run("--help").startswith("lt-sglang --help")
    assert run("echo", "hello") == "hello"


def test_kernels_are_those_of_this_flashinfer(tmp_path: Path) -> None:
    """Every kernel has a recipe in the pinned FlashInfer; a renamed one fails here, not in a build."""
    env = {**os.environ, "FLASHINFER_WORKSPACE_BASE": str(tmp_path), "FLASHINFER_CUDA_ARCH_LIST": "8.0 9.0a"}
    command = [sys.executable, str(DOCKER / "kernels.py"), "--list"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    names = done.stdout.split()
    prefill = [name for name in names if name.startswith("batch_prefill")]
    assert any("use_swa_True" in name for name in prefill) and any(name.endswith("sm90") for name in prefill)


def test_kernels_are_looked_for_where_they_were_compiled() -> None:
    """FlashInfer's folder is named after the list; without it, every pod compiles them again."""
    lists = {
        stage: re.findall(r'FLASHINFER_CUDA_ARCH_LIST=("[^"]+")', STAGES[stage])
        for stage in ("build", "engine")
    }
    assert lists["build"] == lists["engine"] == ['"8.0 9.0a"']


def test_compose_is_valid() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no docker compose here")
    command = [docker, "compose", "-f", str(DOCKER / "compose.yaml"), "config", "--quiet"]
    env = {**os.environ, "MODEL": "/models/m", "LAZY": "8-23"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compose_mounts_exist_and_only_loopback_is_open() -> None:
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["cap_drop"] == ["ALL"]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source


def test_compose_gives_an_engine_time() -> None:
    engine = COMPOSE["services"]["engine"]
    assert engine["stop_grace_period"] == "11m" and engine["shm_size"]
    assert "--enable-metrics" in engine["command"]
