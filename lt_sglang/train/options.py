"""What a run is asked to do, and what of it a resumed run must share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from lt_sglang.config import CONFIG_KEY, LightTransferConfig, format_layers
from lt_sglang.errors import LightTransferError

DTYPES = ("bfloat16", "float32")
RECIPES = "recipes"


@dataclass(frozen=True)
class TrainOptions:
    """One run. Lengths are tokens; batch_size counts rows of max_length tokens a GPU and forward.

    config: the static list and its windows. precision: of the arithmetic. weights: of the trained weights
    and so of gradients and optimizer state; bfloat16 halves them and loses small updates. lora_rank: 0
    trains all weights. gpus: processes of the run. gather: type in which they gather weights.
    save_steps, eval_steps: 0 for once an epoch.
    """

    model_path: str
    data: tuple[Path, ...]
    out: Path
    config: LightTransferConfig
    eval_data: tuple[Path, ...] = ()
    loss_on: str = "answers"
    too_long: str = "truncate"
    max_length: int = 8192
    packing: bool = True
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-5
    warmup_share: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: str = "bfloat16"
    weights: str = "float32"
    gradient_checkpointing: bool = True
    lora_rank: int = 0
    lora_alpha: int = 0
    gpus: int = 1
    gather: str = "float32"
    offload: bool = False
    resume: bool = False
    save_steps: int = 0
    keep_checkpoints: int = 2
    eval_steps: int = 0
    tensorboard: bool = False
    plots: bool = True
    device: str | None = None
    revision: str | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints; ``out`` itself becomes the model."""
        return self.out / "checkpoints"


def record_of(options: TrainOptions, data_sha256: str) -> dict[str, Any]:
    """What a run that goes on must share with the one it continues."""
    return {
        "lazy_layers": format_layers(options.config.lazy_layers),
        "sink_tokens": options.config.sink_tokens,
        "recent_tokens": options.config.recent_tokens,
        "model": options.model_path,
        "data_sha256": data_sha256,
        "max_length": options.max_length,
        "packing": options.packing,
        "loss_on": options.loss_on,
        "too_long": options.too_long,
        "rows_a_step": options.batch_size * options.accumulate * options.gpus,
        "seed": options.seed,
        "weights": options.weights,
        "lora_rank": options.lora_rank,
    }


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise LightTransferError that names what a resumed run has changed."""
    for name, value in now.items():
        if before.get(name) != value:
            raise LightTransferError(
                f"--resume: {where} was trained with {name} {before.get(name)!r}, not {value!r}; go on with "
                "the same, or give another --out"
            )


def read_recipe(name: str) -> dict[str, Any]:
    """A ready recipe of this package by name, or a JSON file: option names and their values.

    Raises:
        LightTransferError: for a file that cannot be read and an option that does not exist.
    """
    path = Path(name).expanduser()
    ready = resources.files("lt_sglang.train").joinpath(RECIPES)
    known = sorted(file.name.removesuffix(".json") for file in ready.iterdir() if file.name.endswith(".json"))
    try:
        text = (ready / f"{name}.json").read_text() if name in known else path.read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError) as error:
        raise LightTransferError(
            f"--recipe {name}: is none of {', '.join(known)}, and no file with JSON ({error})"
        ) from None
    if not isinstance(found, dict):
        raise LightTransferError(f"--recipe {name}: is not a JSON object")
    given_elsewhere = {"config", "resume", "out"}
    allowed = {field.name for field in fields(TrainOptions)} - given_elsewhere | {CONFIG_KEY, "layers"}
    for key in found:
        if key not in allowed and not key.startswith("_"):
            raise LightTransferError(
                f"--recipe {name}: {key} is no option; allowed are {', '.join(sorted(allowed))}"
            )
    return {key: value for key, value in found.items() if not key.startswith("_")}
