"""Whether a checkpoint's files are all there and whole, without loading them. Does not import torch."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lt_sglang.errors import LightTransferError
from lt_sglang.launch import sglang_args as flags
from lt_sglang.launch.model_config import names_folder
from lt_sglang.launch.sglang_args import SglangArgs

INDEX = "model.safetensors.index.json"
# Others read files of their own kinds.
FORMATS = ("auto", "safetensors")
OTHER_WEIGHTS = ("*.bin", "*.pt")


def check_weights(args: SglangArgs) -> str:
    """What was found of the model that ``args`` name, as a sentence.

    Raises:
        LightTransferError: naming the file, if a start would not find all weights.
    """
    model = args.get(flags.MODEL_PATH) or ""
    load_format = args.get(flags.LOAD_FORMAT) or "auto"
    if load_format not in FORMATS:
        return f"not looked at: {flags.LOAD_FORMAT[0]} {load_format}"
    if not names_folder(model):
        return f"not looked at: {model} is no folder of this machine"
    return check_folder(Path(model).expanduser())


def check_folder(folder: Path) -> str:
    """As check_weights, of a model's folder."""
    index = folder / INDEX
    if index.is_file():
        wanted = _shards(index)
    else:
        wanted = {file.name: () for file in sorted(folder.glob("*.safetensors"))}
    if not wanted:
        others = [file for pattern in OTHER_WEIGHTS for file in folder.glob(pattern)]
        if not others:
            raise LightTransferError(f"{folder}: has no weights (*.safetensors, *.bin or *.pt)")
        empty = [file for file in others if not file.stat().st_size]
        if empty:
            raise LightTransferError(f"{empty[0]}: is empty")
        return f"{len(others)} files, of which only the size was looked at"
    tensors = sum(_check_file(folder / name, names) for name, names in wanted.items())
    return f"{tensors} tensors in {len(wanted)} safetensors files, all whole"


def _shards(index: Path) -> dict[str, tuple[str, ...]]:
    """The tensors of each file that an index names."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for tensor, file in named.items():
            shards.setdefault(Path(file).name, []).append(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LightTransferError(f"{index}: is no index of safetensors files ({error!r})") from None
    if not shards:
        raise LightTransferError(f"{index}: names no tensor")
    return {name: tuple(tensors) for name, tensors in sorted(shards.items())}


def _check_file(file: Path, wanted: tuple[str, ...]) -> int:
    """The number of tensors in a safetensors file, which must have ``wanted`` and all of its bytes."""
    if not file.is_file():
        raise LightTransferError(f"{file}: is missing; {INDEX} names it")
    try:
        # It maps the file, and holds its length against its header.
        with safe_open(file, "numpy") as opened:
            tensors = set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise LightTransferError(f"{file}: is no whole safetensors file ({error})") from None
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise LightTransferError(f"{file}: has no tensor {missing[0]}, which {INDEX} says it has")
    return len(tensors)
