"""A trained checkpoint, served by ``lt-sglang serve OUT`` without a flag of ours: the trainer's tokens."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lt_sglang.cli import main
from lt_sglang.config import LightTransferConfig
from lt_sglang.launch.plan import plan_launch
from lt_sglang.train.attention import attach

from .models import FIRST_TOKEN, VOCAB_SIZE, ensure_model
from .reference import TIE_MARGIN, Reference
from .server import ServerSpec, running
from .server_flags import FLAGS, TINY_POOL

LAYERS, SINKS, RECENT = "0,2,3,5", 9, 40
NEW_TOKENS = 32
SEED = 6

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@dataclass(frozen=True)
class Served(ServerSpec):
    """As ``lt-sglang serve MODEL`` starts it."""

    def command(self, port: int) -> list[str]:
        words = [str(self.model()), "--host", "127.0.0.1", "--port", str(port), *self.flags]
        launch = plan_launch([*words, "--dtype", "float32", "--skip-server-warmup"], os.environ)
        return launch.command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    rng = random.Random(SEED)
    data, out = folder / "data.jsonl", folder / "out"
    lines = [
        {"prompt": "ab" * rng.randint(40, 90), "completion": "cd" * rng.randint(5, 30)} for _ in range(16)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = str(ensure_model("qwen2"))
    words = ["--model-path", model, "--data", str(data), "--out", str(out), "--lt-lazy-layers", LAYERS]
    words += ["--lt-sink-tokens", str(SINKS), "--lt-recent-tokens", str(RECENT), "--max-length", "256"]
    words += ["--max-steps", "4", "--learning-rate", "1e-3", "--precision", "float32", "--device", "cpu"]
    assert main(["train", *words, "--no-plots"]) == 0
    return out


def test_served_tokens_are_the_trainers(trained: Path, tmp_path: Path) -> None:
    """Prompts below and beyond the window, greedy, float32."""
    from transformers import AutoModelForCausalLM

    rng = random.Random(SEED)
    prompts = [[rng.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(n)] for n in (20, 49, 200, 900)]
    with running(Served("trained", lambda: trained, None, (*FLAGS, *TINY_POOL)), tmp_path) as server:
        told = server.lighttransfer()
        assert told["sink_tokens"] == SINKS and told["recent_tokens"] == RECENT
        outputs = [server.generate(prompt, NEW_TOKENS).tokens for prompt in prompts]
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    layers = (0, 2, 3, 5)
    attach(model, LightTransferConfig(layers, sink_tokens=SINKS, recent_tokens=RECENT))
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *output]])
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        margins = logits.max(1).values - logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert margins.max() < TIE_MARGIN, f"seed {SEED}, prompt of {len(prompt)}: {margins.tolist()}"
    # And of the reference that shares no code with the trainer; full attention would have said something
    # else.
    Reference(trained, layers, SINKS, RECENT).compare(prompts, outputs).assert_equal()
    assert Reference(trained, (), SINKS, RECENT).compare(prompts, outputs).wrong
