"""The roofline of a comparison whose result file does not hold it: from its workload, pools and GPU."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lt_sglang.bench.machine import PLANNED
from lt_sglang.bench.shapes import SHAPES
from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.planner.capacity import Deployment, plan_length
from lt_sglang.planner.roofline import Hardware
from lt_sglang.planner.shapes import GPUS, shape_from_config

# How result files name a model that is served with dummy weights.
MODEL = re.compile(r"(?P<shape>\S+) shape, .*tp (?P<tp>\d+)")
BF16_BYTES = 2


def roofline(result: Mapping[str, Any]) -> dict[str, float]:
    """Bounds of a file's ratios by name; empty where both sides have lazy layers, or too little is known.

    result: a file of ``loadtest/make_results.py`` on one of the planner's GPUs, with a bfloat16 KV cache.
    """
    workload, ours, base = (result[name] for name in ("workload", "lighttransfer", "baseline"))
    found = MODEL.match(workload.get("model", ""))
    gpu = next((name for part, name in PLANNED if part in result["hardware"]), None)
    pools = (ours.get("config") or {}).get("pools")
    if not (found and gpu and pools and base["engine"].startswith("stock")):
        return {}
    name, tp = found["shape"].lower(), int(found["tp"])
    shape = shape_from_config(SHAPES[name], name)
    fields = {field.name for field in dataclasses.fields(LightTransferConfig)}
    config = LightTransferConfig.from_dict({k: v for k, v in ours["config"].items() if k in fields})
    lazy = len(config.lazy_layers)
    rows = (shape.layers - lazy) * pools["full_tokens"] + lazy * pools["streaming_tokens"]
    deployment = Deployment(
        shape=shape,
        hardware=Hardware(GPUS[gpu], tp),
        config=config,
        mem_fraction=1.0,
        weights_bytes=shape.total_weight_bytes,
        kv_bytes=rows * shape.kv_token_layer(BF16_BYTES, tp),
    )
    prefill = workload["kind"] == "prefill"
    outputs = 1 if prefill else workload["new_tokens"]
    # Clients were the limit where both sides ran the same number.
    equal = result["ratio"].get("requests_running") == 1
    most = ours["requests_running"] if equal else ours.get("requests")
    try:
        plan = plan_length(deployment, workload["prompt_tokens"], outputs, most)
    except LightTransferError:
        return {}
    if prefill:
        return {"prefill_speed": plan.full_prefill / plan.hybrid_prefill}
    if plan.decode_ratio is None:
        return {}
    return {
        "requests_running": plan.hybrid_requests / plan.full_requests,
        "decode_tokens_per_second": plan.decode_ratio,
    }
