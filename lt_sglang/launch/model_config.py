"""Read a model's config.json without importing transformers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lt_sglang.errors import LightTransferError


def read_model_config(model_path: str, revision: str | None = None) -> dict[str, Any] | None:
    """config.json of a local folder or a hub name; None if it is neither: SGLang knows other sources.

    Raises:
        LightTransferError: with the cause, if a folder or the hub has none, or if it is not a JSON object.
    """
    folder = Path(model_path).expanduser()
    if names_folder(model_path):
        if not folder.is_dir():
            raise LightTransferError(f"--model-path {model_path}: no such folder")
        file = folder / "config.json"
        if not file.is_file():
            raise LightTransferError(f"--model-path {model_path}: the folder has no config.json")
    else:
        if not _HUB_NAME.fullmatch(model_path) or folder.is_file() or os.environ.get(_OTHER_HUB):
            return None
        file = _fetch(model_path, revision)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LightTransferError(f"{file}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise LightTransferError(f"{file}: must be a JSON object")
    return data


def names_folder(model_path: str) -> bool:
    """Whether it is a folder of this machine, or is written as one, which no hub name or file is."""
    path = Path(model_path).expanduser()
    return path.is_dir() or (model_path.startswith(("/", "./", "../", "~")) and not path.is_file())


# With it, SGLang takes names from ModelScope.
_OTHER_HUB = "SGLANG_USE_MODELSCOPE"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_IGNORE_WINDOW = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


def _fetch(name: str, revision: str | None) -> Path:
    """config.json from the hub, or from this machine's copy of it; raises LightTransferError at once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    file, cause = "config.json", None
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision))  # hf_hub_download tries six times
    except Exception as error:
        cause = " ".join(str(error).split())
    try:
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=cause is not None))
    except Exception as error:
        raise LightTransferError(
            f"--model-path {name}: no such folder, and the hub does not give its {file}: {cause or error}"
        ) from None


def unsupported_features(model_config: Mapping[str, Any]) -> list[str]:
    """What a config.json names that lazy layers do not work with; the server checks the model again."""
    text = _text(model_config)
    layer_types = set(text.get("layer_types") or ())
    # SGLang's code of these models reads neither the window nor the kinds of layers: it serves all of them
    # with full attention, and so finds no layer with a window of its own (model_runner._check_layers).
    ignored = text.get("model_type") in _IGNORE_WINDOW
    named = bool(text.get("sliding_window")) and text.get("use_sliding_window") is not False
    window = not ignored and (named or "sliding_attention" in layer_types)
    found = {
        "a sliding window of its own": window,
        "latent attention (MLA)": bool(text.get("kv_lora_rank")),
        "linear-attention or state-space layers": bool(layer_types - {"full_attention", "sliding_attention"}),
        "logit soft-capping": bool(text.get("attn_logit_softcapping")),
        "an encoder": bool(text.get("is_encoder_decoder")),
    }
    return [name for name, present in found.items() if present]


def check_tp(model_config: Mapping[str, Any], tp: int, flag: str) -> None:
    """Raise LightTransferError if a model's heads cannot be dealt out to ``tp`` GPUs; ``flag`` names it.

    Of a model whose heads config.json does not name, nothing is said. On a CPU, SGLang pads heads.
    """
    text = _text(model_config)
    heads = text.get("num_attention_heads")
    if type(heads) is not int or heads < 1:
        return
    if heads % tp:
        raise LightTransferError(f"{flag} {tp}: does not divide the model's {heads} heads")
    kv_heads = text.get("num_key_value_heads")
    if type(kv_heads) is int and kv_heads >= 1 and kv_heads % tp and tp % kv_heads:
        raise LightTransferError(
            f"{flag} {tp}: neither divides the model's {kv_heads} KV heads nor is a multiple of them"
        )


def _text(model_config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = model_config.get("text_config")
    return nested if isinstance(nested, Mapping) else model_config
