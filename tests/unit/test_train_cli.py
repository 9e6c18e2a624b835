"""The command line of lt-sglang train: whose layers, recipes, several GPUs, and what is refused."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lt_sglang.cli import main
from lt_sglang.cli.train import _arguments, as_options, choose_config, run
from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.train.options import TrainOptions, read_recipe

from .train_runs import SAMPLES, listed, words, write_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "train.jsonl", SAMPLES)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--lt-lazy-layers", "1,9"), "layer 9 does not exist, the model has layers 0 to 5"),
        ((), "lazy layers: none are known for"),
        (listed("--lt-mode", "dynamic"), "training needs one list"),
        (listed("--lt-keep", "0.5"), "--lt-keep: only with --layers frequency"),
        (listed("--layers", "frequency"), "--layers frequency: chooses the lazy layers"),
        (("--lt-lazy-layers", "ends:7"), "--lt-lazy-layers: ends:7 of 6 layers is 7; 1 to 6 can be lazy"),
        (listed("--lt-recent-tokens", "1020"), "given twice"),
        (
            listed("--max-length", "64", "--loss-on", "all"),
            "no sample is longer than sink + recent tokens (64)",
        ),
        (listed("--data", "/nowhere.jsonl"), "--data /nowhere.jsonl: no such file"),
        (listed("--device", "cuda"), "--device cuda: torch finds no GPU here"),
        (listed("--recipe", "unknown"), "--recipe unknown: is none of qwq-32b"),
        (listed("--epochs", "0"), "not a number above 0"),
    ],
)
def test_bad_requests(
    more: tuple[str, ...], why: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["train", *words(data, tmp_path / "run", *more)]) == 2
    assert why in capsys.readouterr().err


def config_of(data: Path, tmp_path: Path, *more: str) -> tuple[LightTransferConfig, Any]:
    from lt_sglang.launch.options import take_options

    options, rest = take_options(words(data, tmp_path / "run", *more))
    args = _arguments(rest)
    return choose_config(options, args), args


def test_the_ends_of_the_stack(data: Path, tmp_path: Path) -> None:
    config, _ = config_of(data, tmp_path, "--lt-lazy-layers", "ends:0.5")
    assert config.lazy_layers == (0, 4, 5) and "ends" in config.source


def test_layers_by_frequency(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """calibrate sees question and answer; a list that stands is not chosen again."""
    from lt_sglang.cli import calibrate

    seen: list[list[str]] = []

    def choose(argv: list[str]) -> int:
        seen.append(argv)
        out = Path(argv[argv.index("--out") + 1])
        out.write_text(json.dumps({"lighttransfer": {"lazy_layers": "2-4", "recent_tokens": 60}}))
        return 0

    monkeypatch.setattr(calibrate, "run", choose)
    for _ in range(2):
        config, _ = config_of(
            data, tmp_path, "--layers", "frequency", "--lt-keep", "3", "--lt-score", "error-mass"
        )
        assert config.lazy_layers == (2, 3, 4)
    assert len(seen) == 1 and {"--lt-keep=3", "--lt-score=error-mass"} <= set(seen[0])
    lines = (tmp_path / "run" / "calibrate.jsonl").read_text().splitlines()
    assert len(lines) == 48 and "the word is" in json.loads(lines[0])["text"]


def test_several_gpus_are_torchruns(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One list, in a file, for all processes; FSDP2 with one layer a unit."""
    from lt_sglang.cli import train as cli
    from lt_sglang.train.trainer import arguments

    class Started(Exception):
        pass

    def start(_program: str, command: list[str]) -> None:
        raise Started(command)

    monkeypatch.setattr(cli.os, "execv", start)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(Started) as raised:
        run(words(data, tmp_path / "run", "--lt-lazy-layers", "ends:0.5", "--gpus", "2"))
    command = raised.value.args[0]
    assert "--nproc-per-node=2" in command and command[command.index("-m", 3) + 1] == "lt_sglang"
    config, args = config_of(data, tmp_path, *command[-4:])
    assert command[-4:-1] == ["--layers", "given", "--lt-config"] and config.lazy_layers == (0, 4, 5)
    options = as_options(args, config)
    assert options.gpus == 1  # the words above do not have it
    given = arguments(TrainOptions(**{**vars(options), "gpus": 2}), ["LlamaDecoderLayer"], False)
    assert given.fsdp_plugin_args["fsdp_version"] == 2 and given.fsdp_plugin_args["activation_checkpointing"]
    assert given.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"
    assert not given.gradient_checkpointing


def test_recipes(data: Path, tmp_path: Path) -> None:
    """A recipe's values are checked as flags are, and flags on the command line win."""
    recipe = tmp_path / "mine.json"
    values = {"learning_rate": 0.5, "epochs": 2, "packing": False, "lighttransfer": {"lazy_layers": "2"}}
    recipe.write_text(json.dumps({"_note": "any", **values}))
    config, args = config_of(data, tmp_path, "--recipe", str(recipe))
    assert config.lazy_layers == (2,) and config.recent_tokens == 60
    assert args.epochs == 2 and not args.packing and args.learning_rate == 3e-3
    recipe.write_text(json.dumps({"packing": True, "nonsense": 1}))
    with pytest.raises(LightTransferError, match="nonsense is no option"):
        config_of(data, tmp_path, "--recipe", str(recipe))
    recipe.write_text(json.dumps({"loss_on": "questions"}))
    with pytest.raises(LightTransferError, match=r"mine\.json: .*questions"):
        config_of(data, tmp_path, "--recipe", str(recipe), *listed())
    ready = read_recipe("qwq-32b")
    assert LightTransferConfig.from_dict(ready["lighttransfer"]).lazy_layers[-1] == 51


def test_nothing_that_serves_imports_it() -> None:
    """Nor does training import what serves: only configuration, errors and the planner's shapes."""
    allowed = ("lt_sglang.config", "lt_sglang.errors", "lt_sglang.train", "lt_sglang.planner")
    for path in (ROOT / "lt_sglang").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        inside = name.startswith("lt_sglang/train/")
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                if inside and module.startswith(("lt_sglang", "sglang")):
                    assert module.startswith(allowed), f"{name} imports {module}"
                if not inside and name not in ("lt_sglang/cli/train.py", "lt_sglang/cli/plan_train.py"):
                    assert not module.startswith("lt_sglang.train"), f"{name} imports {module}"
