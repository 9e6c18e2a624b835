"""Folders as that of cxdu/QwQ-32B-LightTransfer on the hub, with seeded weights.

The hub's page tells its model type, ``qwen2littrans``, and that it has code of its own; its config.json was
not seen. So there is a folder for every form that it may have, all with the weights of one tiny Qwen2: the
published training code has Qwen2's names and shapes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .models import ensure_model

NAME = "QwQ-32B-LightTransfer"

# What a config.json made from Qwen2.5-32B-Instruct's says, beside the sizes.
QWEN25: dict[str, Any] = {
    "max_window_layers": 70,
    "rope_theta": 10000.0,
    "sliding_window": 131072,
    "torch_dtype": "float32",
    "transformers_version": "4.46.3",
    "use_sliding_window": False,
}
NEWER = ("dtype", "layer_types", "rope_parameters")
CONFIGURATION = """\
from transformers import Qwen2Config


class Qwen2LitTransConfig(Qwen2Config):
    model_type = "qwen2littrans"
"""
MODELING = """\
from transformers import Qwen2ForCausalLM

from .configuration_qwen2littrans import Qwen2LitTransConfig


class Qwen2LitTransForCausalLM(Qwen2ForCausalLM):
    config_class = Qwen2LitTransConfig
"""
OWN: dict[str, Any] = {
    "model_type": "qwen2littrans",
    "auto_map": {
        "AutoConfig": "configuration_qwen2littrans.Qwen2LitTransConfig",
        "AutoModelForCausalLM": "modeling_qwen2littrans.Qwen2LitTransForCausalLM",
    },
}
FORMS: dict[str, dict[str, Any]] = {
    # Also what an operator makes of the others, who lets no code of theirs run.
    "qwen2": {"lazy_list": [5, 6, 7], "sink_len": 128, "auto_map": OWN["auto_map"]},
    "a type of its own": OWN,
    "a type and an architecture of its own": {**OWN, "architectures": ["Qwen2LitTransForCausalLM"]},
}
OWN_TYPE, OWN_ARCHITECTURE = list(FORMS)[1:]


def checkpoint(form: str, parent: Path) -> Path:
    """A folder as the hub's, with seeded weights."""
    folder = parent / NAME
    shutil.copytree(ensure_model("qwen2", layers=64), folder)
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **QWEN25, **FORMS[form]}
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in NEWER}))
    if "auto_map" in config:
        write_code(folder)
    return folder


def write_code(folder: Path) -> None:
    """The code that a config.json with ``auto_map`` names."""
    (folder / "configuration_qwen2littrans.py").write_text(CONFIGURATION)
    (folder / "modeling_qwen2littrans.py").write_text(MODELING)
