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

from deploy.tools.fetch import image_extra
from lt_sglang.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))

TEST_TOOLS = {"pytest", "hypothesis", "mypy", "ruff", "schemathesis", "mutmut", "pre-commit", "pip", "locust"}
ARGS = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE.split("\nFROM")[0], re.MULTILINE))
STAGES = dict(re.findall(r"(?ms)^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE))


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


def test_manifests_name_files_of_the_image() -> None:
    """What a manifest takes from the image's own folder, the image has."""
    files = [*(ROOT / "k8s").rglob("*.yaml"), *(ROOT / "deploy").rglob("*.yaml")]
    named = {
        path for file in files for path in re.findall(r"/opt/[\w./-]+", file.read_text(encoding="utf-8"))
    }
    assert [path for path in named if path not in DOCKERFILE] == []


def test_only_the_tools_that_an_engine_needs_stay() -> None:
    """SGLang compiles its activation, norm and rope kernels as it starts, so nvcc and g++ are needed."""
    import sglang.kernels.ops.activation.activation as activation

    assert hasattr(activation, "load_jit"), "compiled ahead now: take the compilers out of the image"
    engine = re.sub(r"#.*", "", STAGES["engine"])
    assert "FROM ${CUDA_DEVEL} AS engine" in DOCKERFILE and "CUDA_HOME=/usr/local/cuda" in engine
    assert re.search(r"\bg\+\+ ", engine) and not re.search(r"\b(git|cmake|make|curl)\b", engine)
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
    lock = (DOCKER / "engine.lock").read_text(encoding="utf-8").splitlines()
    assert {item for item in project["dependencies"] if "==" in item} <= set(lock)
    gateway = (DOCKER / "gateway.lock").read_text(encoding="utf-8").splitlines()
    assert "sglang-router==0.3.2" in gateway
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in gateway[1:])


def test_the_image_has_no_tools_of_tests() -> None:
    """The versions of the environment that is tested, without what tests need, and what it has besides."""
    locks = [
        set((folder / name).read_text(encoding="utf-8").splitlines()[2:])
        for folder, name in ((DOCKER, "engine.lock"), (ROOT, "requirements.lock"))
    ]
    engine, tested = ({line for line in lock if not line.startswith("#")} for lock in locks)
    names, more = ({line.partition("==")[0] for line in lines} for lines in (engine, image_extra()))
    assert engine - tested == set(image_extra())
    # test_traces.py and test_object_store.py run these.
    assert more >= {"opentelemetry-exporter-otlp-proto-grpc", "runai-model-streamer-s3"} and len(more) < 15
    assert not names & TEST_TOOLS
    assert names >= {"sglang", "torch", "flashinfer-python", "ray", "matplotlib", "trl"}


def test_a_new_version_changes_the_last_layers_alone() -> None:
    """What is large and seldom changes comes first; nothing of the clone is copied before it is installed."""
    engine = STAGES["engine"]
    places = [
        engine.index(part) for part in ("/wheels/cuda", "/wheels/others", "/kernels /opt", "/wheels/own")
    ]
    assert places == sorted(places)
    assert engine.index("COPY deploy") > places[-1] and "COPY lt_sglang" not in engine
    build = STAGES["build"]
    patterns = re.findall(r"grep -v?E '\^\((.*?)\)'", build)
    large, small = (set(pattern.split("|")) for pattern in patterns)
    assert large == small - {"#"}, "each package is in one of the two"
    lock = (DOCKER / "engine.lock").read_text(encoding="utf-8").splitlines()
    cuda = {line.partition("==")[0] for line in lock if re.match("|".join(large), line)}
    assert {"torch", "triton", "flashinfer-python"} <= cuda and "sglang" not in cuda


def test_nodes_need_the_driver_that_is_named() -> None:
    """CUDA 13 needs NVIDIA's driver 580 (its release notes); README and operations say so."""
    assert re.search(r"nvidia/cuda:13\.", ARGS["CUDA_DEVEL"]), "another CUDA, another oldest driver"
    for file in ("README.md", "docs/operations.md", "docs/your-model.md"):
        assert "driver 580" in (ROOT / file).read_text(encoding="utf-8"), file


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
    for command in COMMANDS:
        assert run(command).startswith(f"lt-sglang {command}")


def test_kernels_are_those_of_this_flashinfer(tmp_path: Path) -> None:
    """Every kernel has a recipe in the pinned FlashInfer; a renamed one fails here, not in a build."""
    env = {**os.environ, "FLASHINFER_WORKSPACE_BASE": str(tmp_path), "FLASHINFER_CUDA_ARCH_LIST": "8.0 9.0a"}
    command = [sys.executable, str(DOCKER / "kernels.py"), "--list"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    names = done.stdout.split()
    prefill = [name for name in names if name.startswith("batch_prefill")]
    assert any("use_swa_True" in name for name in prefill) and any(name.endswith("sm90") for name in prefill)


# Stands in for nvcc and c++: writes what it is asked for, and down that it was asked.
COMPILER = """\
#!{python}
import os, subprocess, sys
words = sys.argv[1:]
if "--version" in words:
    sys.exit(print("Cuda compilation tools, release 13.0, V13.0.88"))
with open(os.environ["COMPILED"], "a") as log:
    print(" ".join(words), file=log)
target = words[words.index("-o") + 1]
if "-shared" in words:
    sys.exit(subprocess.call(["/usr/bin/gcc", "-shared", "-x", "c", "/dev/null", "-o", target]))
open(target, "w").close()
for flag in ("-MF", "--dependency-output"):
    if flag in words:
        with open(words[words.index(flag) + 1], "w") as file:
            print(target + ":", file=file)
"""
LOAD = """\
import sys
from pathlib import Path
from flashinfer.jit import env as places
places.FLASHINFER_AOT_DIR = Path(sys.argv[2])
sys.path.insert(0, sys.argv[1])
import kernels
for spec in kernels.specs((64, 128), ("bfloat16", "float16")):
    spec.build_and_load()
print("loaded")
"""


@pytest.mark.skipif(not Path("/usr/bin/gcc").exists(), reason="needs gcc")
def test_compiled_kernels_are_loaded_as_they_are(tmp_path: Path) -> None:
    """By a process with another home and no compiler; from FlashInfer's cache they would be compiled again.

    The compilers are stand-ins; the recipes, ninja and what decides whether to compile are FlashInfer's.
    """
    tools = tmp_path / "cuda" / "bin"
    tools.mkdir(parents=True)
    for name in ("nvcc", "c++"):
        (tools / name).write_text(COMPILER.format(python=sys.executable))
        (tools / name).chmod(0o755)
    log, into = tmp_path / "compiled", tmp_path / "aot"
    programs = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    base = {name: value for name, value in os.environ.items() if not name.startswith("FLASHINFER")}
    base |= {"COMPILED": str(log), "FLASHINFER_CUDA_ARCH_LIST": "8.0 9.0a"}

    def run(home: str, command: list[str], **more: str) -> str:
        env = {**base, "FLASHINFER_WORKSPACE_BASE": str(tmp_path / home), **more}
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    build = [str(DOCKER / "kernels.py"), "--head-dims", "64,128", "--dtypes", "bfloat16,float16"]
    build += ["--into", str(into)]
    compilers = {"CUDA_HOME": str(tmp_path / "cuda"), "CXX": str(tools / "c++")}
    names = run("image", build, PATH=f"{tools}:{programs}", **compilers).split()
    assert log.read_text().count("\n") > len(names) == 25
    assert {file.parent.name for file in into.glob("*/*.so")} == set(names)
    shutil.rmtree(tmp_path / "image")
    log.unlink()
    assert "loaded" in run("pod", ["-c", LOAD, str(DOCKER), str(into)], PATH=programs, CUDA_HOME="/nowhere")
    assert not log.exists()


def test_a_build_takes_other_gpus_and_heads() -> None:
    build = STAGES["build"]
    assert 'ARG CUDA_ARCHS="8.0 9.0a"' in build and 'FLASHINFER_CUDA_ARCH_LIST="$CUDA_ARCHS"' in build
    assert 'ARG DTYPES="bfloat16,float16"' in build and '--dtypes "$DTYPES"' in build
    assert 'ARG HEAD_DIMS="128"' in build and '--head-dims "$HEAD_DIMS"' in build


def test_compose_is_valid() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no docker compose here")
    command = [docker, "compose", "-f", str(DOCKER / "compose.yaml"), "config", "--quiet"]
    env = {**os.environ, "MODEL": "/models/m"}
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
