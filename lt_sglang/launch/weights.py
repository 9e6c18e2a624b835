"""Whether a checkpoint's files are all there and whole, without loading them.

Reads the index and the header of each safetensors file (format: 8 bytes with the header's length, little
endian, the header as JSON, then the tensors). Imports neither torch nor safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.launch import sglang_args as flags
from lt_sglang.launch.model_config import names_folder
from lt_sglang.launch.sglang_args import SglangArgs

INDEX = "model.safetensors.index.json"
# Others read files of their own kinds.
FORMATS = ("auto", "safetensors")
OTHER_WEIGHTS = ("*.bin", "*.pt")
MOST_HEADER_BYTES = 1 << 30


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
        size = file.stat().st_size
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
                raise ValueError("its header is cut off")
            header = json.loads(data.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((_end(entry) for entry in tensors.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise LightTransferError(f"{file}: is no whole safetensors file ({error})") from None
    if size != end:
        raise LightTransferError(f"{file}: has {size} bytes, its header says {end}; it is cut off or damaged")
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise LightTransferError(f"{file}: has no tensor {missing[0]}, which {INDEX} says it has")
    return len(tensors)


def _end(entry: Mapping[str, Any]) -> int:
    return int(entry["data_offsets"][1])
