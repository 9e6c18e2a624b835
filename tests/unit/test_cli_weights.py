"""lt_sglang.launch.weights, on files that the safetensors library wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lt_sglang.errors import LightTransferError
from lt_sglang.launch.sglang_args import SglangArgs
from lt_sglang.launch.weights import INDEX, check_folder, check_weights

SHARDS = {
    "model-00001-of-00002.safetensors": ("a", "b"),
    "model-00002-of-00002.safetensors": ("c", "scalar", "empty"),
}
TENSORS = {
    "a": np.ones((3, 4), np.float32),
    "b": np.ones(5, np.float16),
    "c": np.ones((2, 2), np.int64),
    "scalar": np.array(1, np.float32),
    "empty": np.ones((0, 3), np.float32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, tensors in SHARDS.items():
        save_file({tensor: TENSORS[tensor] for tensor in tensors}, tmp_path / name, metadata={"format": "pt"})
    shards = {tensor: name for name, tensors in SHARDS.items() for tensor in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}))
    return tmp_path


FIRST, SECOND = SHARDS


def test_a_whole_checkpoint(folder: Path) -> None:
    assert check_folder(folder) == "5 tensors in 2 safetensors files, all whole"
    (folder / INDEX).unlink()
    assert check_folder(folder) == "5 tensors in 2 safetensors files, all whole"


def test_a_file_that_the_index_does_not_name_is_not_read(folder: Path) -> None:
    """Beside its shards, a model may have everything once more in consolidated.safetensors."""
    (folder / "consolidated.safetensors").write_bytes(b"half a download")
    check_folder(folder)


def test_a_missing_shard(folder: Path) -> None:
    (folder / SECOND).unlink()
    with pytest.raises(LightTransferError, match=f"{SECOND}: is missing; {INDEX} names it"):
        check_folder(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1], ids=lambda kept: f"{kept} bytes")
def test_a_truncated_file(folder: Path, kept: int) -> None:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data[:kept])
    with pytest.raises(LightTransferError, match=f"{SECOND}: (is no whole safetensors file|has .* bytes)"):
        check_folder(folder)
    (folder / SECOND).write_bytes(data)
    check_folder(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        (20).to_bytes(8, "little") + b"not json, not at all" + b"\0" * 64,
        (10).to_bytes(8, "little") + b'{"a": [1]}',
        (2).to_bytes(8, "little") + b"[]",
        b"<!DOCTYPE html> a page that says the file is gone, saved under its name",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
    ],
    ids=["ones", "no-json", "a-list-in-the-header", "a-list", "a-web-page", "an-lfs-pointer"],
)
def test_a_file_that_is_something_else(folder: Path, data: bytes) -> None:
    (folder / FIRST).write_bytes(data)
    with pytest.raises(LightTransferError, match=f"{FIRST}: is no whole safetensors file"):
        check_folder(folder)


def test_a_shard_of_another_model(folder: Path) -> None:
    save_file({"a": TENSORS["a"]}, folder / FIRST)
    with pytest.raises(LightTransferError, match=f"{FIRST}: has no tensor b, which {INDEX} says it has"):
        check_folder(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_bad_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(LightTransferError, match=f"{INDEX}: is no index of safetensors files"):
        check_folder(folder)


def test_an_index_of_nothing(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(LightTransferError, match="names no tensor"):
        check_folder(folder)


def test_other_kinds_of_weights(tmp_path: Path) -> None:
    with pytest.raises(LightTransferError, match=r"has no weights \(\*\.safetensors, \*\.bin or \*\.pt\)"):
        check_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LightTransferError, match=r"pytorch_model\.bin: is empty"):
        check_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "1 files" in check_folder(tmp_path)


def test_what_is_not_looked_at(tmp_path: Path) -> None:
    for argv, said in (
        ([str(tmp_path), "--load-format", "dummy"], "not looked at: --load-format dummy"),
        (["org/name"], "not looked at: org/name is no folder"),
    ):
        assert check_weights(SglangArgs(argv)).startswith(said)
    with pytest.raises(LightTransferError, match="has no weights"):
        check_weights(SglangArgs([str(tmp_path), "--load-format=safetensors"]))
