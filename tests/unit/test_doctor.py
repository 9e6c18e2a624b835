"""lt_sglang.doctor: the checks that need no SGLang process. tests/contract runs the rest."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from lt_sglang import doctor
from lt_sglang.cli import doctor as command
from lt_sglang.cli import main
from lt_sglang.doctor import Check, DoctorError, run_check
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.processes import free_port

REQUIRES = [
    "torch==2.14.1",
    "flashinfer_python[cu13]==0.7.2",
    "sglang-kernel==0.4.10; platform_system == 'Linux'",
    "numpy",
    "torchao>=0.9",
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    versions = {"sglang": doctor.SGLANG_VERSION, "torch": "2.14.1+cu130", "flashinfer-python": "0.7.2"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    return versions


def entry(name: str = "lighttransfer", value: str = doctor.PLUGIN_VALUE) -> Any:
    return SimpleNamespace(name=name, value=value)


def test_pins_are_read_from_sglangs_metadata(installed: dict[str, str]) -> None:
    pins = [
        doctor.pinned_version(name)
        for name in ("torch", "flashinfer-python", "sglang-kernel", "numpy", "torchao")
    ]
    assert pins == ["2.14.1", "0.7.2", "0.4.10", None, None]


def test_versions(installed: dict[str, str]) -> None:
    assert doctor.check_sglang_version() == f"sglang {doctor.SGLANG_VERSION}"
    assert "as sglang pins" in doctor.check_pinned("torch")
    installed["torch"] = "2.9.0"
    with pytest.raises(DoctorError, match=r"torch 2\.9\.0 is installed, sglang pins 2\.14\.1"):
        doctor.check_pinned("torch")
    with pytest.raises(DoctorError, match="sglang-kernel is not installed"):
        doctor.check_pinned("sglang-kernel")
    installed["sglang"] = "0.5.24"
    with pytest.raises(DoctorError, match=r"sglang 0\.5\.24 is installed, needed is"):
        doctor.check_start()
    del installed["sglang"]
    with pytest.raises(DoctorError, match="sglang is not installed"):
        doctor.check_start()


def test_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [entry()]
    monkeypatch.setattr(metadata, "entry_points", lambda group: found if group == doctor.PLUGIN_GROUP else [])
    monkeypatch.delenv(doctor.ALLOW_LIST_VARIABLE, raising=False)
    assert "lighttransfer" in doctor.check_entry_point()
    monkeypatch.setenv(doctor.ALLOW_LIST_VARIABLE, "other, lighttransfer")
    doctor.check_entry_point()
    monkeypatch.setenv(doctor.ALLOW_LIST_VARIABLE, "other")
    with pytest.raises(DoctorError, match="SGLANG_PLUGINS does not list lighttransfer"):
        doctor.check_entry_point()
    found[:] = [entry(value="elsewhere:register")]
    with pytest.raises(DoctorError, match="is not installed"):
        doctor.check_entry_point()


def test_run_check_never_raises() -> None:
    def broken() -> str:
        raise RuntimeError("a\nb")

    def refused() -> str:
        raise LightTransferError("two\nlines")

    assert run_check("x", lambda: "fine") == Check("x", True, "fine")
    assert run_check("x", broken) == Check("x", False, "RuntimeError: a b")
    assert run_check("x", refused) == Check("x", False, "two lines")


@pytest.mark.parametrize(
    ("line", "ok"), [("H100|9|0|79.2", True), ("A100|8|0|79.2", True), ("T4|7|5|15", False)]
)
def test_gpu_generation(monkeypatch: pytest.MonkeyPatch, line: str, ok: bool) -> None:
    monkeypatch.setattr(doctor, "_child", lambda what, gpu: [line])
    check = run_check("device", doctor.check_gpu)
    assert check.ok == ok
    assert line.partition("|")[0] in check.message


def test_a_child_that_fails_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(what: str, gpu: bool) -> list[str]:
        raise DoctorError("SGLang cannot be imported here: boom")

    monkeypatch.setattr(doctor, "_child", broken)
    (check,) = doctor.check_inner_names(on_gpu=True)
    assert not check.ok
    assert "boom" in check.message


def test_lines_of_the_child_become_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_child", lambda what, gpu: ["hooks|ok|4 hooks", "names|FAIL|a | b"])
    assert doctor.check_inner_names(on_gpu=True) == [
        Check("hooks", True, "4 hooks"),
        Check("names", False, "a | b"),
    ]


@pytest.mark.parametrize("fine", [True, False])
def test_command(fine: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("one", True, "good"), Check("two", fine, "as may be")]
    monkeypatch.setattr(command, "check_machine", lambda on_gpu: iter(checks))
    monkeypatch.setattr(command, "has_gpu", lambda: False)
    assert main(["doctor"]) == (0 if fine else 1)
    assert capsys.readouterr().out.splitlines() == [
        "ok    one: good",
        f"{'ok  ' if fine else 'FAIL'}  two: as may be",
    ]
    assert main(["doctor", "--json"]) == (0 if fine else 1)
    assert json.loads(capsys.readouterr().out)[1] == {"name": "two", "ok": fine, "message": "as may be"}


def test_a_bad_configuration_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "check_machine", lambda on_gpu: iter(()))
    monkeypatch.setattr(command, "has_gpu", lambda: False)
    assert main(["doctor", "--model-path", "m", "--lt-lazy-layers", "5-"]) == 1
    assert capsys.readouterr().out.startswith("FAIL  configuration: --lt-lazy-layers: '5-'")


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def of_model(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *flags: str,
    gpus: Sequence[int] = (80 * 2**30,),
    **config: Any,
) -> dict[str, tuple[bool, str]]:
    """The checks of a model with two shards on a GPU, by name; SGLang accepts all flags."""
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    monkeypatch.setattr(command, "check_arguments", lambda argv, on_gpu: "accepted")
    monkeypatch.setattr(command, "gpu_memory", lambda: list(gpus))
    argv = ["--model-path", str(folder), "--device", "cuda", "--lt-lazy-layers", "1,3", *flags]
    machine = [Check("machine", True, "fine")]
    return {check.name: (check.ok, check.message) for check in command.check_model(argv, machine)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for tensor, file in shards.items():
        save_file({tensor: np.ones(3, np.float32)}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return tmp_path


@pytest.fixture
def port() -> Iterator[int]:
    """A taken one."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        yield holder.getsockname()[1]


def test_a_model_that_would_start(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = of_model(checkpoint, monkeypatch, "--port", str(free_port()))
    assert list(found) == ["configuration", "model", "weights", "memory", "ports", "machine", "flags"]
    assert all(ok for ok, _ in found.values()), found
    assert "GiB of weights; about" in found["memory"][1] and "requests of 512 tokens" in found["memory"][1]


def test_nothing_fits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok, message = of_model(checkpoint, monkeypatch, gpus=[int(0.8 * 2**30)])["memory"]
    assert not ok and "leave no room for KV" in message
    ok, message = of_model(checkpoint, monkeypatch, "--tensor-parallel-size", "2")["memory"]
    assert not ok and message == "--tensor-parallel-size 2: needs 2 GPUs here, and there are 1"
    assert of_model(checkpoint, monkeypatch, "--tp", "2", "--nnodes", "2")["memory"][0]


def test_memory_of_a_cpu(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and KV of --max-total-tokens in what is free; where heads are padded, GPUs are spoken of."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**24))
    found = of_model(checkpoint, monkeypatch, "--device", "cpu", "--tp", "3")
    ok, message = found["memory"]
    assert not ok and "GiB of KV do not fit into the 0.0156 GiB that are free" in message
    assert found["configuration"][0] and "GPUs would refuse this: --tp 3: does not" in found["model"][1]
    assert of_model(checkpoint, monkeypatch, "--device", "cpu", "--max-total-tokens", "9000")["memory"][0]


def test_the_configuration_comes_before_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "check_machine", lambda on_gpu: iter([Check("machine", True, "fine")]))
    monkeypatch.setattr(command, "has_gpu", lambda: False)
    assert main(["doctor", "m", "--lt-mode", "static", "--lt-keep", "2"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("FAIL  configuration: --") and second == "ok    machine: fine"


def test_a_missing_shard_fails(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "model-2.safetensors").unlink()
    ok, message = of_model(checkpoint, monkeypatch)["weights"]
    assert not ok and "model-2.safetensors: is missing" in message


def test_a_tp_that_does_not_divide_the_heads_fails_as_plan_does(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ok, message = of_model(checkpoint, monkeypatch, "--tp-size", "3")["configuration"]
    assert not ok and message == "--tp-size 3: does not divide the model's 8 heads"
    assert main(["plan", "--model-path", str(checkpoint), "--lt-lazy-layers", "1", "--tp", "3"]) == 2
    assert "--tp 3: does not divide the model's 8 heads" in capsys.readouterr().err


def test_a_taken_port_fails(checkpoint: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ok, message = of_model(checkpoint, monkeypatch, "--port", str(port))["ports"]
    assert not ok and message.startswith(f"--port {port}: process ")


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 2},
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 4096},
    ],
    ids=["use_sliding_window", "layer_types"],
)
def test_windows_that_sglang_does_not_serve_are_no_obstacle(
    config: dict[str, Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's Qwen2 reads neither: every layer has full attention, and a start finds nothing odd."""
    assert of_model(checkpoint, monkeypatch, model_type="qwen2", **config)["model"][0]
    ok, message = of_model(checkpoint, monkeypatch, model_type="gpt_oss", **config)["model"]
    assert not ok and "a sliding window of its own" in message
