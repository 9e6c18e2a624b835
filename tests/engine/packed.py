"""A plug-in that adds a quantization method in plain torch: int8 rows with a scale each, no ``weight`` left.

SGLang's own methods (AWQ, GPTQ, FP8) need kernels that the CPU engine does not have. What they share is what
this shows: a linear layer has no ``weight`` to read, and is used through its ``quant_method``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

NAME = "packed"
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [out, in] and float32 [out, 1] of a weight [out, in]."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def ensure_rounded_model(model: Path) -> Path:
    """``model`` with the weights that packing leaves, for a reference; made on the first call."""
    from safetensors.torch import load_file, save_file

    target = model.parent / f"{model.name}-{NAME}"
    if not target.is_dir():
        scratch = model.parent / f".{target.name}"
        shutil.copytree(model, scratch, dirs_exist_ok=True)
        for file in scratch.glob("*.safetensors"):
            weights = load_file(file)
            for name, weight in weights.items():
                if name.endswith(tuple(f"{layer}.weight" for layer in LAYERS)):
                    packed, scale = pack(weight)
                    weights[name] = packed * scale
            save_file(weights, file, metadata={"format": "pt"})
        scratch.rename(target)
    return target


def register() -> None:
    """Called by SGLang in each of its processes."""
    from sglang.srt.arg_groups.choices import add_quantization_method_choices
    from sglang.srt.layers import quantization

    method = _config_class()
    quantization.QUANTIZATION_METHODS[NAME] = method
    quantization.CPU_QUANTIZATION_METHODS[NAME] = method
    add_quantization_method_choices([NAME])


def _config_class() -> Any:
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.base_config import QuantizationConfig
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    class PackedMethod(UnquantizedLinearMethod):
        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            layer.packed, layer.scale = pack(layer.weight.data)
            del layer.weight

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return torch.nn.functional.linear(x, layer.packed * layer.scale, bias)

    class PackedConfig(QuantizationConfig):
        @classmethod
        def get_name(cls) -> str:
            return NAME

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            return [torch.float32, torch.bfloat16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> PackedConfig:
            return cls()

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            return PackedMethod() if isinstance(layer, LinearBase) else None

        def get_scaled_act_names(self) -> list[str]:
            return []

    return PackedConfig
