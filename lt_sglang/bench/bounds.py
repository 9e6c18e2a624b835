"""The roofline beside a measured ratio: what lazy layers could gain at most on this traffic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lt_sglang.bench.scenario import Length, Scenario
from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.planner.capacity import KV_ELEMENT_BYTES, Deployment, plan_mix
from lt_sglang.planner.mix import Part
from lt_sglang.planner.roofline import Hardware
from lt_sglang.planner.shapes import GPUS, ModelShape

# A plan needs some GPU; of a CPU's run only figures are used that no speed enters.
ANY_GPU = "h100-80"


@dataclass(frozen=True)
class Bounds:
    """Ratios by the name of the measured figure, and a remark on what they are, or why there are none."""

    ratios: dict[str, float]
    remark: str


def bounds(
    scenario: Scenario,
    shape: ModelShape,
    config: LightTransferConfig,
    tp: int,
    gpu: str | None,
    stock_tokens: int,
    server: dict[str, Any],
    own_dtype: str | None = None,
) -> Bounds:
    """The bounds of ``scenario`` on one model and machine.

    Args:
        scenario: what is run.
        shape: of the model.
        config: settled, as the server uses it.
        tp: GPUs of one server.
        gpu: the planner's name; None on a CPU, whose speed it does not know.
        stock_tokens: what the stock server's KV memory holds: both servers have the same bytes.
        server: the stock server's /server_info.
        own_dtype: ``kv_cache_dtype`` of ours; None: as stock's.
    """
    if scenario.load.phases:
        return Bounds({}, "No bound: the traffic changes.")
    mix = mean_mix(scenario)
    if mix is None:
        return Bounds({}, "No bound: prompts share prefixes or follow a trace.")
    if "--enable-dp-attention" in scenario.engine.baseline_flags:
        return Bounds({}, "No bound: the two sides divide the model differently.")
    dtype = server.get("kv_cache_dtype") or "auto"
    deployment = Deployment(
        shape=shape,
        hardware=Hardware(GPUS[gpu or ANY_GPU], tp),
        config=config,
        mem_fraction=1.0,
        weights_bytes=shape.total_weight_bytes,
        kv_cache_dtype=_known(dtype),
        chunk_tokens=server.get("chunked_prefill_size") or 8192,
        kv_bytes=stock_tokens * shape.layers * shape.kv_token_layer(KV_ELEMENT_BYTES[_known(dtype)], tp),
    )
    users = scenario.load.users if scenario.load.kind == "closed" else None
    try:
        stock = plan_mix(deployment, mix, users)
        ours = plan_mix(replace(deployment, kv_cache_dtype=_known(own_dtype or dtype)), mix, users)
    except LightTransferError as error:
        return Bounds({}, f"No bound: {error}.")
    if not stock.full_requests:
        return Bounds({}, "No bound: not one request fits into stock's memory.")
    found = {"requests_running": ours.hybrid_requests / stock.full_requests}
    if gpu is None:
        return Bounds(found, "Bound: whole requests in the same KV memory. A CPU's speed is not modelled.")
    found["decode_tokens_per_second"] = ours.hybrid_decode / stock.full_decode
    found["output_throughput"] = ours.hybrid_total / stock.full_total
    if all(part.output_tokens == 1 for part in mix):
        found["prefill_speed"] = stock.full_prefill / ours.hybrid_prefill
    mean = "" if _fixed(scenario) else " of the mean lengths"
    return Bounds(found, f"Bound: lt-sglang plan's roofline{mean}, with stock's measured KV memory.")


def _known(dtype: str) -> str:
    return dtype if dtype in KV_ELEMENT_BYTES else "auto"


def mean_mix(scenario: Scenario) -> tuple[Part, ...] | None:
    """Each kind of traffic with its mean lengths; None where prompts share tokens or follow a trace."""
    total = sum(kind.weight for kind in scenario.traffic)
    mix = []
    for kind in scenario.traffic:
        if kind.input is None or kind.output is None or kind.shared is not None or kind.turns > 1:
            return None
        lengths = round(_mean(kind.input)), max(1, round(_mean(kind.output)))
        if kind.weight:
            mix.append(Part(*lengths, kind.weight / total))
    return tuple(mix)


def _mean(length: Length) -> float:
    if length.kind == "lognormal":
        # Clipped at both ends, so the median is nearer to the truth than the unclipped mean.
        return length.median
    return (length.low + length.high) / 2


def _fixed(scenario: Scenario) -> bool:
    return all(
        length is not None and length.kind == "fixed"
        for kind in scenario.traffic
        for length in (kind.input, kind.output)
    )
