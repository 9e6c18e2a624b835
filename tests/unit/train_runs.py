"""What the tests of lt-sglang train run: a tiny model, and questions about a word."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.engine.models import ensure_model

STEPS, SAVE = 8, 4
SEED = 3
SAMPLES = 48
LAYERS = "1,3,5"


def write_data(path: Path, samples: int) -> Path:
    rng = random.Random(SEED)
    with path.open("w") as file:
        for _ in range(samples):
            word = rng.choice(["red", "green", "blue"])
            prompt = f"{word} " * rng.randint(20, 50)
            file.write(json.dumps({"prompt": prompt, "completion": f"the word is {word}"}) + "\n")
    return path


def words(data: Path, out: Path, *more: str) -> list[str]:
    """Two steps' worth of options; ``more`` come last and win."""
    model = str(ensure_model("llama"))
    return [
        *("--model-path", model, "--data", str(data), "--out", str(out)),
        *("--lt-recent-tokens", "60", "--max-length", "256", "--device", "cpu", "--precision", "float32"),
        *(
            "--learning-rate",
            "3e-3",
            "--max-steps",
            str(STEPS),
            "--save-steps",
            str(SAVE),
            "--seed",
            str(SEED),
        ),
        *more,
    ]


def listed(*more: str) -> tuple[str, ...]:
    return ("--lt-lazy-layers", LAYERS, *more)
