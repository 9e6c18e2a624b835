"""lt_sglang.doctor: the checks that need no SGLang process. tests/contract runs the rest."""

from __future__ import annotations

import json
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from lt_sglang import doctor
from lt_sglang.cli import doctor as command
from lt_sglang.cli import main
from lt_sglang.doctor import Check, DoctorError, run_check
from lt_sglang.errors import LightTransferError

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
    assert capsys.readouterr().out.startswith("FAIL  configuration: lazy_layers")
