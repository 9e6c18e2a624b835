"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lt_sglang.memory.units import UnitShape
from lt_sglang.planner.capacity import Deployment, LengthPlan, MixPlan, better_split
from lt_sglang.planner.shapes import GIB

COLUMNS = (
    ("input", "tokens"),
    ("output", "tokens"),
    ("at once", "full"),
    ("at once", "hybrid"),
    ("decode", "bound"),
    ("decode", "expected"),
    ("with", "prefill"),
    ("tok/s", "full"),
    ("tok/s", "hybrid"),
    ("KV GiB", "full"),
    ("KV GiB", "hybrid"),
    ("a step is", "mostly"),
)

NOTES = """\
Quality is not in this table. It depends on which layers are lazy, and lt-sglang eval measures it for a model.
at once: requests of this length that fit into the KV memory together, with full KV and with lazy layers.
decode: tokens/s of hybrid over full KV, an estimate. The bound counts KV bytes only; expected, and tok/s, add
  whole requests, weights and compute (rounding can lift it above the bound). with prefill: of whole requests.
KV GiB: of one request on all GPUs. A server is not made for one length: requests of all lengths share its
  memory as they come."""


def as_text(
    deployment: Deployment, plans: Sequence[LengthPlan], lazy_layers: str, mix: MixPlan | None = None
) -> str:
    """Header, table and notes; ``lazy_layers`` is the line that describes the configuration."""
    rows = [_row(plan) for plan in plans]
    top, second = ([column[line] for column in COLUMNS] for line in (0, 1))
    table = [top, second, *rows]
    widths = [max(len(row[index]) for row in table) for index in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    lines.insert(2, "  ".join("-" * width for width in widths))
    head = _header(deployment, lazy_layers)
    mixed = [] if mix is None else _of_mix(mix)
    notes = [*_why(deployment, plans), *mixed, NOTES, *_remarks(deployment, plans)]
    return "\n".join([*head, "", *lines, "", *notes])


def _header(deployment: Deployment, lazy_layers: str) -> list[str]:
    shape, hardware = deployment.shape, deployment.hardware
    return [
        f"{shape.name}, {shape.layers} layers, {shape.q_heads} query and {shape.kv_heads} KV heads of "
        f"{shape.head_dim}, {_count(shape.params)} weights ({deployment.weights_bytes / GIB:.3g} GiB)",
        lazy_layers,
        f"{hardware.tp} x {hardware.gpu.name} ({hardware.gpu.memory / GIB:.1f} GiB, "
        f"{deployment.mem_fraction:g} of it used): {deployment.kv_budget / GIB:.3g} GiB for KV on each, "
        f"KV in {deployment.kv_cache_dtype}",
    ]


def as_dict(
    deployment: Deployment, plans: Sequence[LengthPlan], mix: MixPlan | None = None
) -> dict[str, Any]:
    """Everything as plain values; bytes and tokens, ratios None where full KV holds no request."""
    hardware = deployment.hardware
    return {
        "model": asdict(deployment.shape),
        "gpu": asdict(hardware.gpu),
        "tp": hardware.tp,
        "mem_fraction_static": deployment.mem_fraction,
        "kv_cache_dtype": deployment.kv_cache_dtype,
        "weights_bytes": deployment.weights_bytes,
        "kv_budget_bytes_per_gpu": deployment.kv_budget,
        "lighttransfer": deployment.config.to_dict(),
        "lengths": [asdict(plan) for plan in plans],
        "mix": None if mix is None else asdict(mix),
    }


def _row(plan: LengthPlan) -> list[str]:
    return [
        str(plan.input_tokens),
        str(plan.output_tokens),
        str(plan.full_requests),
        str(plan.hybrid_requests),
        f"{plan.bound:.2f}x",
        _ratio(plan.decode_ratio),
        _ratio(plan.total_ratio),
        f"{plan.full_decode:.0f}",
        f"{plan.hybrid_decode:.0f}",
        f"{plan.full_kv_gib:.3g}",
        f"{plan.hybrid_kv_gib:.3g}",
        plan.limit,
    ]


def _why(deployment: Deployment, plans: Sequence[LengthPlan]) -> list[str]:
    plan = plans[-1]
    budget = deployment.hardware.tp * deployment.kv_budget / GIB
    return [
        f"A request of {plan.input_tokens} + {plan.output_tokens} tokens holds {plan.full_kv_gib:.3g} GiB of "
        f"KV in full and {plan.hybrid_kv_gib:.3g} GiB with lazy",
        f"layers, so {budget:.3g} GiB hold {plan.full_requests}, or {plan.hybrid_requests} besides a prefill "
        "and room for windows to slide.",
        "",
    ]


def _of_mix(mix: MixPlan) -> list[str]:
    parts = ", ".join(f"{part.share:.3g} x {part.input_tokens} + {part.output_tokens}" for part in mix.parts)
    more = ""
    if mix.full_requests:
        more = f" ({mix.hybrid_requests / mix.full_requests:.2f}x)"
    return [
        f"Mixed ({parts}): {mix.full_requests} requests run at once with full KV, {mix.hybrid_requests} with "
        f"lazy layers{more};",
        f"expected {mix.full_total:.0f} and {mix.hybrid_total:.0f} tok/s with prefill "
        f"({_ratio(mix.total_ratio)}), decode alone {_ratio(mix.decode_ratio)}.",
        "",
    ]


def _count(number: float) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _remarks(deployment: Deployment, plans: Sequence[LengthPlan]) -> list[str]:
    remarks = []
    if any(plan.input_tokens + plan.output_tokens <= deployment.config.lazy_tokens for plan in plans):
        remarks.append(
            f"Requests of up to {deployment.config.lazy_tokens} tokens gain nothing: their KV is kept whole."
        )
    if any(not plan.full_requests and plan.hybrid_requests for plan in plans):
        remarks.append(
            "Where full KV holds no request, there is nothing to compare with: only lazy layers make it fit."
        )
    if deployment.config.dynamic:
        remarks.append(
            "Until its layers are found, a prompt holds its KV in all of them; one at a time does."
        )
    remarks += _lists(deployment)
    heads = deployment.shape.kv_heads
    if deployment.hardware.tp > heads:
        remarks.append(f"With more GPUs than the model's {heads} KV heads, GPUs hold copies of the same KV.")
    return [""] * bool(remarks) + remarks


def _lists(deployment: Deployment) -> list[str]:
    """On numbers of layers that have only a small common divisor (docs/decisions/kv-units.md)."""
    layers, lazy = deployment.shape.layers, len(deployment.config.lazy_layers)
    shape = UnitShape(layers - lazy, lazy)
    if not lazy or shape.parts <= 2:
        return []
    told = (
        f"{shape.full_layers} full and {lazy} lazy layers have no common divisor above {shape.lanes}: each "
        f"step writes {shape.full_units + shape.streaming_units} index lists, with as many of both 2."
    )
    better = better_split(shape.full_layers, layers)
    if better is None:
        return [told]
    fewer = UnitShape(better, layers - better)
    return [f"{told} With {better} full layers it is {fewer.full_units + fewer.streaming_units}."]
