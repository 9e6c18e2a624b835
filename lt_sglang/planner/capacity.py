"""What fits into the KV memory of one rank, by the arithmetic of the server itself."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import NamedTuple

from lt_sglang.config import MAX_BYTES, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.sizes import Sizes, size_memory
from lt_sglang.memory.units import UnitShape
from lt_sglang.planner.mix import Mix, Part, requests_at_once, running
from lt_sglang.planner.roofline import (
    Hardware,
    LazyShare,
    Throughput,
    decode_bound,
    kv_bytes,
    mixed_throughput,
)
from lt_sglang.planner.shapes import GIB, ModelShape

# The CUDA context and what else torch does not see: 0.7 GiB were measured on an H100.
RESERVE_BYTES = 0.75 * GIB
NO_LAZY = LazyShare(0, 0)
NEAR_SHARE = 8  # of all layers: how far from what was asked for another number of full layers is proposed
SLIDE_INTERVAL = 128  # SGLang's default (SGLANG_SWA_EVICTION_INTERVAL)
KV_ELEMENT_BYTES = {"auto": 2, "bfloat16": 2, "bf16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True)
class Deployment:
    """A model on a tensor-parallel group with lazy layers; everything a plan depends on but the lengths.

    weights_bytes: all weights of the group. chunk_tokens: --chunked-prefill-size. kv_bytes: KV memory of one
    rank where it is known, from a server's log; otherwise it is reckoned from the GPU's memory.
    """

    shape: ModelShape
    hardware: Hardware
    config: LightTransferConfig
    mem_fraction: float
    weights_bytes: float
    kv_cache_dtype: str = "auto"
    chunk_tokens: int = 8192
    kv_bytes: int | None = None

    @property
    def element_bytes(self) -> int:
        """Bytes of one K or V number."""
        return KV_ELEMENT_BYTES[self.kv_cache_dtype]

    @property
    def lazy(self) -> LazyShare:
        """The lazy layers and what they keep."""
        return LazyShare(len(self.config.lazy_layers), self.config.lazy_tokens)

    @property
    def kv_budget(self) -> int:
        """Bytes for KV on one rank; raises LightTransferError if the weights leave none."""
        most = self.config.kv_bytes or MAX_BYTES
        if self.kv_bytes is not None:
            return min(self.kv_bytes, most)
        memory, tp = self.hardware.gpu.memory, self.hardware.tp
        left = memory * self.mem_fraction - RESERVE_BYTES - self.weights_bytes / tp
        if left <= 0:
            raise LightTransferError(
                f"--tp {tp}: {self.weights_bytes / tp / GIB:.1f} GiB of weights on a GPU leave no room for "
                f"KV in {self.mem_fraction:g} of {memory / GIB:.1f} GiB; raise --tp or --mem-fraction-static"
            )
        return min(int(left), most)


@dataclass(frozen=True)
class LengthPlan:
    """One length. Requests are whole; ratios are hybrid to full KV, None where full KV holds no request.

    bound: decode ratio if only KV bytes counted. decode_ratio, total_ratio: roofline of decode, and of
    prefill and decode together. full_decode, hybrid_decode: roofline of decode, tokens/s. full_prefill,
    hybrid_prefill: of one prompt, seconds. limit: what takes most of a hybrid decode step.
    """

    input_tokens: int
    output_tokens: int
    full_requests: int
    hybrid_requests: int
    bound: float
    decode_ratio: float | None
    total_ratio: float | None
    full_decode: float
    hybrid_decode: float
    full_prefill: float
    hybrid_prefill: float
    full_kv_gib: float
    hybrid_kv_gib: float
    limit: str


@dataclass(frozen=True)
class MixPlan:
    """A mix of lengths; fields as of LengthPlan. full_total, hybrid_total: tokens/s with prefill."""

    parts: tuple[Part, ...]
    full_requests: int
    hybrid_requests: int
    decode_ratio: float | None
    total_ratio: float | None
    full_decode: float
    hybrid_decode: float
    full_total: float
    hybrid_total: float
    full_prefill: float
    hybrid_prefill: float


class _Sides(NamedTuple):
    """Both sides of a plan: requests at once and roofline, with full KV and with lazy layers."""

    full: int
    hybrid: int
    stock: Throughput
    ours: Throughput

    @property
    def decode_ratio(self) -> float | None:
        return self.ours.decode_rate / self.stock.decode_rate if self.full else None

    @property
    def total_ratio(self) -> float | None:
        return self.ours.total_rate / self.stock.total_rate if self.full else None


def plan_mix(deployment: Deployment, mix: Mix, at_most: int | None = None) -> MixPlan:
    """Plan requests of several lengths at once; raises LightTransferError if one of them does not fit.

    at_most: as of ``plan_length``.
    """
    found = _sides(deployment, mix, at_most)
    return MixPlan(
        parts=tuple(mix),
        full_requests=found.full,
        hybrid_requests=found.hybrid,
        decode_ratio=found.decode_ratio,
        total_ratio=found.total_ratio,
        full_decode=found.stock.decode_rate,
        hybrid_decode=found.ours.decode_rate,
        full_total=found.stock.total_rate,
        hybrid_total=found.ours.total_rate,
        full_prefill=found.stock.prefill_time,
        hybrid_prefill=found.ours.prefill_time,
    )


def plan_length(
    deployment: Deployment, input_tokens: int, output_tokens: int, at_most: int | None = None
) -> LengthPlan:
    """Plan requests of ``input_tokens`` + ``output_tokens``; raises LightTransferError if none fits.

    at_most: requests that clients send at once, if memory holds more.
    """
    shape, tp, lazy = deployment.shape, deployment.hardware.tp, deployment.lazy
    one = Part(input_tokens, output_tokens)
    found = _sides(deployment, (one,), at_most)
    ours, element = found.ours, deployment.element_bytes
    times = {
        "reading KV": ours.kv_time,
        "reading weights": ours.weight_time if ours.weight_time >= ours.compute_time else 0.0,
        "matrix products": ours.compute_time if ours.compute_time > ours.weight_time else 0.0,
    }
    return LengthPlan(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        full_requests=found.full,
        hybrid_requests=found.hybrid,
        bound=decode_bound(one.tokens, lazy.lazy_layers / shape.layers, lazy.lazy_tokens),
        decode_ratio=found.decode_ratio,
        total_ratio=found.total_ratio,
        full_decode=found.stock.decode_rate,
        hybrid_decode=ours.decode_rate,
        full_prefill=found.stock.prefill_time,
        hybrid_prefill=ours.prefill_time,
        full_kv_gib=tp * kv_bytes(shape, one.tokens, NO_LAZY, element, tp) / GIB,
        hybrid_kv_gib=tp * kv_bytes(shape, one.tokens, lazy, element, tp) / GIB,
        limit=max(times, key=times.__getitem__) if found.hybrid else "KV memory: not one request fits",
    )


def better_split(full_layers: int, layers: int) -> int | None:
    """A number of full layers near ``full_layers`` with longer units, so fewer index lists; None if none is.

    Near: an eighth of all layers away at most. Of two that are as near the one with the longer units.
    """
    near = layers // NEAR_SHARE
    now = UnitShape(full_layers, layers - full_layers).lanes
    candidates = [
        full
        for full in range(max(1, full_layers - near), min(layers - 1, full_layers + near) + 1)
        if UnitShape(full, layers - full).lanes > now
    ]
    if not candidates:
        return None
    return min(candidates, key=lambda full: (abs(full - full_layers), -UnitShape(full, layers - full).lanes))


def _sides(deployment: Deployment, mix: Mix, at_most: int | None) -> _Sides:
    shape, tp, lazy = deployment.shape, deployment.hardware.tp, deployment.lazy
    longest = max(mix, key=lambda part: part.tokens)
    if shape.max_tokens is not None and longest.tokens > shape.max_tokens:
        raise LightTransferError(
            f"{longest.input_tokens} + {longest.output_tokens} tokens are more than the {shape.max_tokens} "
            "of the model's context (--context-length)"
        )
    budget, element = deployment.kv_budget, deployment.element_bytes
    mean = sum(
        weight * kv_bytes(shape, part.tokens, NO_LAZY, element, tp)
        for weight, part in zip(running(mix), mix, strict=True)
    )
    full = hybrid = floor(budget / mean)
    if lazy.lazy_layers:
        sizes = sizes_of(deployment, shape.max_tokens or max(longest.tokens, deployment.chunk_tokens))
        hybrid = requests_at_once(sizes.demand, sizes.units, mix, sizes.full_limit)
    if at_most is not None:
        full, hybrid = min(full, at_most), min(hybrid, at_most)
    stock, ours = (
        mixed_throughput(shape, deployment.hardware, share, requests, mix, element)
        for share, requests in ((NO_LAZY, full), (lazy, hybrid))
    )
    return _Sides(full, hybrid, stock, ours)


def sizes_of(deployment: Deployment, context: int) -> Sizes:
    """The KV memory of a rank as the server sizes it; raises LightTransferError if it holds nothing."""
    shape, lazy = deployment.shape, len(deployment.config.lazy_layers)
    return size_memory(
        deployment.kv_budget,
        UnitShape(shape.layers - lazy, lazy),
        deployment.config,
        token_layer_bytes=shape.kv_token_layer(deployment.element_bytes, deployment.hardware.tp),
        page_size=1,
        chunk_tokens=min(deployment.chunk_tokens, context),
        context_tokens=context,
        interval=SLIDE_INTERVAL,
        full_limit=None,
    )
