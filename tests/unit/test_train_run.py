"""Runs of lt-sglang train on a CPU: the loss falls, the result is served, and what ends a run says why."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lt_sglang.cli import main
from lt_sglang.launch.model_config import read_model_config
from lt_sglang.launch.options import LtOptions, resolve_config
from tests.engine.models import ensure_model

from .train_runs import LAYERS, SAMPLES, SAVE, SEED, STEPS, listed, words, write_data


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """A tiny model is fastest so, beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "train.jsonl", SAMPLES)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with evaluation, figure and checkpoints."""
    out = tmp_path_factory.mktemp("run") / "tiny-lazy"
    held = write_data(out.parent / "eval.jsonl", 4)
    assert main(["train", *words(data, out, *listed("--eval-data", str(held), "--eval-steps", "4"))]) == 0
    return out


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry]


def test_the_loss_falls(trained: Path) -> None:
    """Bar 5 of the method: some steps of a tiny model."""
    found = losses(trained)
    print(f"seed {SEED}: {found}")
    assert len(found) == STEPS
    assert sum(found[-2:]) < 0.7 * sum(found[:2])
    history = json.loads((trained / "log.json").read_text())
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]
    assert (trained / "loss.png").stat().st_size > 5000
    report = json.loads((trained / "data.json").read_text())
    assert report["training"]["samples"] == SAMPLES and report["evaluation"]["samples"] == 4


def test_it_is_served_without_a_flag(trained: Path) -> None:
    """As serve resolves it: list and windows come from config.json; the rest is the parent's."""
    model_config = read_model_config(str(trained))
    assert model_config is not None
    config = resolve_config(LtOptions(), str(trained), model_config, {})
    assert config is not None
    assert (config.lazy_layers, config.sink_tokens, config.recent_tokens) == ((1, 3, 5), 4, 60)
    parent = json.loads((ensure_model("llama") / "config.json").read_text())
    assert {key: model_config[key] for key in parent} == parent
    assert model_config.keys() - parent.keys() == {"lighttransfer"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (trained / name).read_bytes() == (ensure_model("llama") / name).read_bytes()
    # So does every checkpoint on the way.
    middle = read_model_config(str(trained / "checkpoints" / f"checkpoint-{SAVE}"))
    assert middle is not None and middle["lighttransfer"]["lazy_layers"] == LAYERS


def test_its_weights_are_the_last_ones(trained: Path) -> None:
    found = load_file(trained / "model.safetensors")
    last = load_file(trained / "checkpoints" / f"checkpoint-{STEPS}" / "model.safetensors")
    before = load_file(ensure_model("llama") / "model.safetensors")
    assert found.keys() == last.keys() == before.keys()
    assert all(torch.equal(found[name], last[name]) for name in found)
    assert any(not torch.equal(found[name], before[name]) for name in found)


def test_how_to_register_it(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The entry that lt-sglang models prints is one that it reads."""
    from lt_sglang import models

    assert main(["models", "--entry", str(trained)]) == 0
    text = f"[{capsys.readouterr().out}]"

    class File:
        def joinpath(self, _name: str) -> File:
            return self

        def read_text(self) -> str:
            return text

    monkeypatch.setattr(models.resources, "files", lambda _name: File())
    found = models.find_known("someone/Tiny-Lazy")
    assert found is not None and found.config.lazy_layers == (1, 3, 5) and found.num_layers == 6
    monkeypatch.undo()
    assert main(["models"]) == 0
    assert "models --entry FOLDER" in capsys.readouterr().out
    assert main(["models", "--entry", str(ensure_model("llama"))]) == 2
    assert "has no key 'lighttransfer'" in capsys.readouterr().err


def test_resume_goes_on(trained: Path, data: Path, tmp_path: Path) -> None:
    """From the last complete checkpoint, with the losses of a run that was not cut off."""
    out = tmp_path / "cut"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "checkpoints" / f"checkpoint-{STEPS}")
    incomplete = out / "checkpoints" / "checkpoint-6"
    incomplete.mkdir()
    (incomplete / "model.safetensors").write_bytes(b"cut off")
    wanted = losses(out)
    (out / "log.json").unlink()
    assert main(["train", *words(data, out, *listed("--resume"))]) == 0
    assert losses(out) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--lt-lazy-layers", "1,3", "--resume"), "was trained with lazy_layers '1,3,5', not '1,3'"),
        (listed("--lt-sink-tokens", "5", "--resume"), "sink_tokens 4, not 5"),
        (listed("--max-length", "384", "--resume"), "max_length 256, not 384"),
        (listed("--accumulate", "2", "--resume"), "rows_a_step 1, not 2"),
        (listed(), "holds a run up to checkpoint-8; go on with --resume"),
    ],
)
def test_another_run_is_not_continued(
    more: tuple[str, ...], why: str, trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words(data, trained, *more)]) == 2
    assert why in capsys.readouterr().err


def test_resume_of_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words(data, tmp_path / "new", *listed("--resume"))]) == 2
    assert "holds no run" in capsys.readouterr().err


def break_step(monkeypatch: pytest.MonkeyPatch, step: int, what: Callable[[Any], Any]) -> None:
    """Put the loss of one step through ``what``."""
    from trl import SFTTrainer

    real = SFTTrainer.compute_loss

    def compute(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, *args, **kwargs)
        return what(loss) if self.state.global_step == step - 1 else loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops(
    value: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the weights see it; the last good checkpoint stays, and can be gone on from."""
    break_step(monkeypatch, 4, lambda loss: loss * float(value))
    out = tmp_path / "run"
    more = listed("--save-steps", "1", "--no-plots", "--max-steps", "5")
    assert main(["train", *words(data, out, *more)]) == 2
    told = capsys.readouterr().err
    assert "loss: not finite at step 4" in told and "checkpoint-3" in told
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]
    kept = load_file(out / "checkpoints" / "checkpoint-3" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    assert not (out / "model.safetensors").exists()
    if value == "nan":
        monkeypatch.undo()
        assert main(["train", *words(data, out, *more, "--resume")]) == 0


def test_a_full_disk_stops(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was half written is removed, what was whole stays."""
    from transformers import Trainer

    real = Trainer._save_optimizer_and_scheduler

    def save(self: Any, folder: str) -> None:
        if self.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
    out = tmp_path / "run"
    assert main(["train", *words(data, out, *listed("--save-steps", "1", "--no-plots"))]) == 2
    told = capsys.readouterr().err
    assert "checkpoint-2: the disk is full" in told and "checkpoint-1." in told
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-1"]


def test_lora_is_merged(data: Path, tmp_path: Path) -> None:
    """Into the parent's weights, of the parent's names; the adapter stays beside them."""
    out = tmp_path / "lora"
    assert (
        main(["train", *words(data, out, *listed("--lora-rank", "4", "--max-steps", "2", "--no-plots"))]) == 0
    )
    before = load_file(ensure_model("llama") / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed) and not any("norm" in name for name in changed)
    assert (out / "adapter" / "adapter_config.json").is_file()


def test_unpacked_with_tensorboard(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    more = listed("--no-packing", "--batch-size", "2", "--max-steps", "2", "--tensorboard", "--no-plots")
    assert main(["train", *words(data, out, *more, "--no-gradient-checkpointing")]) == 0
    assert list(out.rglob("events.out.tfevents.*"))
    assert not (out / "loss.png").exists()
