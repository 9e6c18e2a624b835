"""All engines of a command are checked before the first of them starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lt_sglang.bench import compare
from lt_sglang.cli import eval as eval_command
from lt_sglang.cli import main, preflight
from lt_sglang.doctor import Check

from ..loadtest.runs import scenario, write

CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": np.ones(3, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What SGLang was asked to read; it accepts all but --nonsense. No engine starts."""
    asked: dict[str, list[str]] = {}

    def check_starts(arguments: dict[str, list[str]], on_gpu: bool) -> list[Check]:
        asked.update(arguments)
        return [
            Check(name, "--nonsense" not in argv, "SGLang does not accept these flags: --nonsense")
            for name, argv in arguments.items()
        ]

    monkeypatch.setattr(preflight, "check_starts", check_starts)
    monkeypatch.setattr(preflight, "has_gpu", lambda: True)
    monkeypatch.setattr("lt_sglang.launch.plan.has_gpu", lambda: True)
    monkeypatch.setattr(eval_command, "Engine", lambda *_: pytest.fail("an engine was started"))
    monkeypatch.setattr(eval_command, "HfTokenizer", lambda *_: pytest.fail("all engines were accepted"))
    monkeypatch.setattr(compare.Bench, "run", lambda *_: pytest.fail("all engines were accepted"))
    return asked


def evaluate(model: Path, out: Path, *engines: str, shared: tuple[str, ...] = ()) -> int:
    argv = ["eval", "--model-path", str(model), "--out", str(out), "--no-plots"]
    for engine in engines:
        argv += ["--engine", engine]
    return main([*argv, *shared])


@pytest.mark.parametrize(
    ("third", "message"),
    [
        ("third=--lt-lazy-layers 1,9", "--engine third: --lt-lazy-layers: layer 9 does not exist"),
        ("third=--lt-lazy-layers 1 --lt-keep 2", "--engine third: --lt-keep: only with --lt-mode dynamic"),
        ("third=--lt-nonsense 1", "--engine third: --lt-nonsense: unknown option"),
        ("third=--lt-mode dynamic --lt-keep 4", "--engine third: --lt-keep: 4 of 4 layers"),
        ("third=--lt-lazy-layers 1 --nonsense", "--engine third: SGLang does not accept these flags"),
        ("third=--lt-lazy-layers 1 --tp-size 3", "--engine third: --tp-size 3: does not divide"),
        ("third=--lt-lazy-layers '1", '--engine third: "--lt-lazy-layers \'1": No closing quotation'),
        ("third", "--engine third: lazy layers: none are known"),
    ],
    ids=lambda value: value.partition(":")[0] if value.startswith("third") else "",
)
def test_eval_starts_no_engine_if_the_third_cannot(
    third: str,
    message: str,
    model: Path,
    tmp_path: Path,
    asked: dict[str, list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(model, tmp_path / "out", "full", "half=--lt-lazy-layers 1,3", third) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lt-sglang: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (("--tp-size", "3"), "--tp-size 3: does not divide the model's 8 heads"),
        (("--nonsense",), "SGLang does"),
    ],
)
def test_eval_checks_what_all_engines_are_given(
    shared: tuple[str, ...],
    message: str,
    model: Path,
    tmp_path: Path,
    asked: dict[str, list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(model, tmp_path / "out", "full", "half=--lt-lazy-layers 1", shared=shared) == 2
    assert f": {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--engine", "full", "--lt-mode", "dynamic"], "--lt-mode: is of one engine; write --engine 'NAME="),
        (
            ["--endpoint", "a=http://a:1", "--tp-size", "2"],
            "--tp-size: unknown option, and --endpoint starts no",
        ),
    ],
)
def test_eval_flags_that_no_engine_would_get(
    argv: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", "--model-path", str(model), "--out", str(tmp_path / "out"), "--no-plots"]
    assert main([*given, *argv]) == 2
    assert capsys.readouterr().err.startswith(f"lt-sglang: {message}")


def test_eval_looks_at_the_weights(
    model: Path, tmp_path: Path, asked: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.safetensors").write_bytes(b"half")
    assert evaluate(model, tmp_path / "out", "full", "half=--lt-lazy-layers 1") == 2
    assert "--engine full: " in (error := capsys.readouterr().err) and "is no whole safetensors" in error
    assert not asked, "SGLang takes seconds to import"


def test_sglang_is_asked_of_every_engine(model: Path, tmp_path: Path, asked: dict[str, list[str]]) -> None:
    with pytest.raises(pytest.fail.Exception, match="all engines were accepted"):
        evaluate(model, tmp_path / "out", "full", "half=--lt-lazy-layers 1,3", "dyn=--lt-mode dynamic")
    assert list(asked) == ["--engine full", "--engine half", "--engine dyn"]
    for argv in asked.values():
        assert argv[argv.index("--model-path") + 1] == str(model)
    assert "lighttransfer" not in asked["--engine full"] and "lighttransfer" in asked["--engine half"]


def bench_of(tmp_path: Path, *flags: str, **engine: Any) -> list[str]:
    settings = {"shape": "tiny", "lighttransfer": {"lazy_layers": "1-3"}, **engine}
    return [
        "bench",
        str(write(tmp_path, scenario(engine=settings))),
        "--work",
        str(tmp_path / "work"),
        *flags,
    ]


def test_bench_checks_both_sides(
    tmp_path: Path, asked: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(bench_of(tmp_path, "--nonsense")) == 2
    assert capsys.readouterr().err.startswith("lt-sglang: small: ")
    assert len(asked) == 2 and any(name.endswith(": lighttransfer") for name in asked)
    assert any(": stock_" in name for name in asked)


def test_bench_of_servers_that_start(tmp_path: Path, asked: dict[str, list[str]]) -> None:
    with pytest.raises(pytest.fail.Exception, match="all engines were accepted"):
        main(bench_of(tmp_path))
    assert len(asked) == 2


def test_one_engine_is_left_to_its_start(asked: dict[str, list[str]]) -> None:
    preflight.check_engines({"one": ["python", "-m", "module", "--model-path", "/none/such"]})
    assert not asked
