"""What a run leaves behind: its record, its figure, and a model folder that is served without a flag."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lt_sglang.config import CONFIG_KEY, LightTransferConfig
from lt_sglang.errors import LightTransferError

RECORD = "train.json"
FIGURE = "loss.png"
# Of the parent's folder, besides config.json: what is about the tokenizer and generation.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*")
_NOT_COPIED = ("*.index.json", "config.json", RECORD)


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)


def parent_folder(model_path: str, revision: str | None = None) -> Path:
    """Where the parent's files lie on this machine."""
    from transformers.utils import cached_file

    return Path(cached_file(model_path, "config.json", revision=revision)).parent


def save_model(
    model: Any, state: Mapping[str, torch.Tensor], parent: Path, out: Path, config: LightTransferConfig
) -> None:
    """The weights in the parent's data type, the parent's other files, and the key ``lighttransfer``.

    model: what the weights are of. state: all of them, on one process. config.json is the parent's own with
    one key more, so that whatever serves the parent serves this too.
    """
    parent_config = json.loads((parent / "config.json").read_text(encoding="utf-8"))
    name = str(parent_config.get("dtype") or parent_config.get("torch_dtype") or "float32")
    dtype = getattr(torch, name.removeprefix("torch."), torch.float32)
    tied = parent_config.get("tie_word_embeddings", False)
    weights = {
        key: value.detach().cpu().to(dtype).contiguous()
        if value.is_floating_point()
        else value.detach().cpu()
        for key, value in state.items()
        if not (tied and key == "lm_head.weight")
    }
    model.save_pretrained(str(out), state_dict=weights)
    for pattern in _COPIED:
        for file in parent.glob(pattern):
            if not any(file.match(other) for other in _NOT_COPIED):
                shutil.copyfile(file, out / file.name)
    parent_config[CONFIG_KEY] = config.to_dict()
    write_json(out / "config.json", parent_config)


def draw(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss by step, and the evaluation's where there was one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def require_matplotlib() -> None:
    """Raises LightTransferError that says how to get it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LightTransferError(
            "the figure needs matplotlib: pip install 'lt-sglang[train]', or give --no-plots"
        ) from None
