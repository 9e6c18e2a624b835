"""lt-sglang plan --train against sums done by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lt_sglang.cli import main
from lt_sglang.config import LightTransferConfig
from lt_sglang.planner.shapes import GIB, GPUS, SHAPES
from lt_sglang.train.plan import TrainJob, plan_training

HALF = LightTransferConfig(tuple(range(1, 32, 2)))
JOB = TrainJob(SHAPES["mistral-7b"], GPUS["h100-80"], HALF)


def test_adamw_of_7b() -> None:
    """16 bytes a weight: 112 GB of 7.24 billion, which no GPU of 80 GB holds; eight do; LoRA fits one."""
    alone = plan_training(JOB)
    assert alone.state == 16 * SHAPES["mistral-7b"].params and not alone.fits
    eight = plan_training(replace(JOB, gpus=8))
    assert eight.state == alone.state / 8 and eight.fits
    lora = plan_training(replace(JOB, lora_rank=16))
    assert 2 * 7.24e9 < lora.state < 2.2 * 7.24e9 and lora.fits
    assert plan_training(replace(JOB, weight_bytes=2)).state == alone.state / 2
    away = plan_training(replace(JOB, gpus=8, offload=True))
    assert away.state == 0 and away.host == eight.state and away.step_seconds > eight.step_seconds


def test_activations() -> None:
    """The inputs of 32 layers at 8K in float32, 4.3 GB, are in it; without checkpoints it is far more."""
    kept = 32 * 8192 * 4096 * 4
    one = plan_training(JOB).activations
    assert kept < one < kept + 5 * GIB
    assert plan_training(replace(JOB, checkpointing=False)).activations > 5 * one
    assert plan_training(replace(JOB, length=16384)).activations > 1.6 * one


def test_attentions_share_and_the_gain() -> None:
    """It grows with the length, and half of the layers lazy take nearly half of it away."""
    plans = {length: plan_training(replace(JOB, length=length)) for length in (4096, 8192, 32768, 131072)}
    shares = [plan.full_attention_share for plan in plans.values()]
    assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] > 0.5
    gains = [plan.full_step_seconds / plan.step_seconds for plan in plans.values()]
    assert gains == sorted(gains) and 1 < gains[0] < 1.1 and 1.4 < gains[-1] < 2
    # 8 passes over 7.24e9 weights and 8192 tokens at half of 989e12, and attention.
    products = 8 * 7.24e9 * 8192 / (989e12 * 0.5)
    assert products < plans[8192].full_step_seconds < 1.4 * products


def test_hours() -> None:
    job = replace(JOB, gpus=8, accumulate=2, tokens=1e9, epochs=2)
    plan = plan_training(job)
    assert plan.tokens_a_step == 8 * 2 * 8192
    assert plan.hours == pytest.approx(2e9 / plan.tokens_a_second / 3600)


def told(capsys: Any, *words: str) -> Any:
    assert main(["plan", "--train", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_recipe_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """QwQ's on 8 GPUs of 80 GB: with the state in the host's memory, and not without at 16K."""
    ready = told(capsys, "--recipe", "qwq-32b", "--samples", "5000")
    (row,) = ready["rows"]
    assert ready["gpus"] == 8 and row["length"] == 16384 and row["fits"] and row["hours"] > 0
    assert ready["lighttransfer"]["sink_tokens"] == 129 and len(ready["lighttransfer"]["lazy_layers"]) > 10
    words = ("--shape", "qwen2.5-32b", "--gpus", "8", "--lengths", "4096,16384")
    assert [row["fits"] for row in told(capsys, *words)["rows"]] == [False, False]
    rows = told(capsys, *words, "--gather", "bfloat16")["rows"]
    assert [row["fits"] for row in rows] == [True, False]


def test_text_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--train", "--shape", "mistral-7b", "--gpus", "8", "--samples", "100"]) == 0
    out = capsys.readouterr().out
    assert "Mistral-7B" in out and "16 lazy layers" in out and "attention" in out
    for words, why in (
        ((), "one of them is needed"),
        (("--shape", "mistral-7b", "--lt-lazy-layers", "40"), "layer 40 does not exist"),
        (("--shape", "mistral-7b", "--lt-mode", "dynamic"), "training needs one list"),
    ):
        assert main(["plan", "--train", *words]) == 2
        assert why in capsys.readouterr().err
