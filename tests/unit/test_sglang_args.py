"""SGLang's arguments: lookups in the command line and in --config's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.launch.sglang_args import ATTENTION_BACKEND, MODEL_OVERRIDES, MODEL_PATH, TP_SIZE, SglangArgs


def test_last_value_wins_and_both_forms_are_read() -> None:
    args = SglangArgs(["--model", "a", "--model-path=b", "--tp", "2"])
    assert args.get(MODEL_PATH) == "b"
    assert args.get_int(TP_SIZE, 1) == 2
    assert args.get(ATTENTION_BACKEND) is None
    assert args.has("--tp") and not args.has("--port")


def test_positional_model() -> None:
    assert SglangArgs(["m", "--port", "1"]).argv == ["--model-path", "m", "--port", "1"]


def test_replaced_values_come_last_and_alone() -> None:
    args = SglangArgs(["--attention-backend", "x", "--port", "1", "--attention-backend=y"])
    assert args.replaced({ATTENTION_BACKEND: "z"}) == ["--port", "1", "--attention-backend", "z"]


@pytest.mark.parametrize(
    "flag", ["--attention-back", "--model-p=x", "--json-model", "--tensor-par", "--conf"]
)
def test_abbreviations_are_refused(flag: str) -> None:
    with pytest.raises(LightTransferError, match="in full"):
        SglangArgs([flag, "v"])


@pytest.mark.parametrize(
    "argv", [["--port"], ["--tp-size", "0"], ["--tp", "two"], ["--tensor-parallel-size=-1"]]
)
def test_bad_values(argv: list[str]) -> None:
    with pytest.raises(LightTransferError, match=f"^{argv[0].partition('=')[0]}: "):
        args = SglangArgs(argv)
        args.get(("--port",))
        args.get_int(TP_SIZE, 1)


@pytest.mark.parametrize("text", ["{", "[1]", "5"])
def test_bad_overrides(text: str) -> None:
    with pytest.raises(LightTransferError, match="--json-model-override-args"):
        SglangArgs(["--json-model-override-args", text]).overrides()


def test_config_file_ranks_below_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        "model_path: from-file\ntp-size: 4\njson-model-override-args: {a: 1}\nenable-metrics: true\n"
    )
    args = SglangArgs(["--config", str(file), "--tp=2"])
    assert args.get(MODEL_PATH) == "from-file"
    assert args.get_int(TP_SIZE, 1) == 2
    assert args.overrides() == {"a": 1}
    assert args.has("--enable-metrics")
    assert args.replaced({MODEL_OVERRIDES: "{}"})[:3] == ["--config", str(file), "--tp=2"]


@pytest.mark.parametrize("text", [None, "- a\n", "a: [\n"])
def test_bad_config_yaml(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "server.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LightTransferError, match="--config"):
        SglangArgs(["--config", str(file)])
