"""Bar 1 on a GPU: logits and gradients of compiled FlexAttention against the dense path, tiny models.

The dense path itself is held against a mask written in a test (tests/unit/test_train_masks.py), on a CPU.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from lt_sglang.config import LightTransferConfig
from lt_sglang.train.attention import attach
from tests.engine.models import COMMON, FAMILIES

WINDOWS = ((4, 60), (0, 32), (129, 128))
LENGTH = 640
DOCUMENTS = (117, 333, 190)
LAZY = (1, 2)
MIXTURES = ("qwen2_moe", "qwen2_moe_shared", "mixtral")
# Largest error relative to the largest value of what is compared, of one path against float32's dense path.
FLOAT32_LIMIT = 2e-4
BF16_TIMES = 3.0  # as large as the dense path's own error in bfloat16, the largest of many


def batch(packed: bool, device: str) -> dict[str, torch.Tensor]:
    """One packed row, or two rows of which one is padded."""
    generator = torch.Generator().manual_seed(0)
    rows = 1 if packed else 2
    ids = torch.randint(3, COMMON["vocab_size"], (rows, LENGTH), generator=generator)
    if packed:
        positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
        made = {"input_ids": ids, "position_ids": positions}
    else:
        mask = torch.ones_like(ids)
        mask[1, LENGTH - 77 :] = 0
        made = {"input_ids": ids, "attention_mask": mask}
    return {name: value.to(device) for name, value in made.items()}


def outputs(
    family: str,
    kind: str,
    windows: tuple[int, int],
    packed: bool,
    checkpointed: bool,
    dtype: torch.dtype,
    device: str,
    backward: bool = True,
) -> dict[str, torch.Tensor]:
    """Logits and the gradients of all weights, float32. Weights are the same for every call of a family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**COMMON, **FAMILIES[family], "num_hidden_layers": 4, "initializer_range": 0.05}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"model_type": family, **shape})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if family in MIXTURES:
        model.set_experts_implementation("eager")  # the same arithmetic for every dtype
    model = model.to(device=device, dtype=dtype).train(backward)
    sink, recent = windows
    attach(model, LightTransferConfig(LAZY, sink_tokens=sink, recent_tokens=recent), kind)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    given = batch(packed, device)
    mask = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    with torch.set_grad_enabled(backward):
        logits = model(**given, use_cache=False).logits.float()
    found = {"logits": logits[mask].detach()}
    if backward:
        logs = torch.log_softmax(logits[:, :-1], 2).gather(2, given["input_ids"][:, 1:, None])[:, :, 0]
        (-logs[mask[:, 1:]].mean()).backward()
        grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
        found |= grads
    return found


def largest_error(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of logits and of gradients, relative to the largest logit and to the largest gradient."""
    assert one.keys() == other.keys()
    # A shared expert of width 0 has weights without elements.
    grads = [name for name in one if name != "logits" and one[name].numel()]
    scale = max((float(other[name].abs().max()) for name in grads), default=1.0)
    error = max((float((one[name] - other[name]).abs().max()) for name in grads), default=0.0)
    logits = float((one["logits"] - other["logits"]).abs().max() / other["logits"].abs().max())
    return {"logits": logits, "gradients": error / scale}


def run(out: dict[str, Any], save: Callable[[], None], device: str, rehearse: bool) -> None:
    """All cells into ``out``."""
    torch.set_float32_matmul_precision("highest")
    # cuDNN's attention refuses the dense mask in bfloat16 here, and then ends the process.
    torch.backends.cuda.enable_cudnn_sdp(False)
    families = list(FAMILIES)[:1] if rehearse else list(FAMILIES)
    windows = WINDOWS[:1] if rehearse else WINDOWS
    cells: list[dict[str, Any]] = out.setdefault("cells", [])
    for dtype, window, packed in itertools.product((torch.float32, torch.bfloat16), windows, (True, False)):
        for family, checkpointed in itertools.product(families, (False, True)):
            cell = {
                "family": family,
                "dtype": str(dtype).removeprefix("torch."),
                "windows": window,
                "packed": packed,
                "checkpointed": checkpointed,
                # A router may send a token elsewhere for bfloat16's last bit.
                "counted": dtype == torch.float32 or family not in MIXTURES,
            }
            started = time.monotonic()
            try:
                cell |= _cell(family, window, packed, checkpointed, dtype, device)
            except Exception as error:  # one cell must not cost the others their result
                cell |= {"good": False, "error": f"{type(error).__name__}: {error}"[:500]}
            cell["seconds"] = round(time.monotonic() - started, 2)
            cells.append(cell)
            _sum_up(out, cells)
            save()
    out["pass"] = out["good"] == out["of"]


def _cell(
    family: str, window: tuple[int, int], packed: bool, checkpointed: bool, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    exact = outputs(family, "dense", window, packed, False, torch.float32, device)
    backward = device != "cpu"  # FlexAttention has no backward there
    flex = outputs(family, "flex", window, packed, checkpointed, dtype, device, backward)
    if not backward:
        exact = {"logits": exact["logits"]}
    error = largest_error(flex, exact)
    limit = {"logits": FLOAT32_LIMIT, "gradients": FLOAT32_LIMIT}
    if dtype == torch.bfloat16:
        dense = outputs(family, "dense", window, packed, checkpointed, dtype, device, backward)
        limit = {name: BF16_TIMES * value for name, value in largest_error(dense, exact).items()}
    good = all(error[name] <= max(limit[name], 1e-6) for name in error)
    return {"error": error, "limit": limit, "good": good}


def _sum_up(out: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    counted = [cell for cell in cells if cell["counted"]]
    out["good"], out["of"] = sum(cell["good"] for cell in counted), len(counted)
    worst: dict[str, float] = {}
    for cell in cells:
        for name, value in cell["error"].items() if isinstance(cell["error"], dict) else ():
            key = f"{cell['dtype']} {name}"
            worst[key] = max(worst.get(key, 0.0), value)
    out["worst"] = worst
