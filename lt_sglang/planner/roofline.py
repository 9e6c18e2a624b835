"""Roofline of decode and prefill with lazy layers.

One decode step of B requests of S tokens on ``tp`` GPUs, a share f of the layers lazy with w tokens:

    step(B)  = max(weights / bandwidth, 2 P B / flops) + B * kv(S) / bandwidth
    kv(S)    = bytes * layers * [(1 - f) S + f min(S, w)]

With the batch limited by KV memory, full and hybrid caches fill the same bytes, so the decode ratio is at
most S / [(1 - f) S + f min(S, w)], which tends to 1 / (1 - f).
"""

from __future__ import annotations

from dataclasses import dataclass

from lt_sglang.planner.mix import Mix, Part, running
from lt_sglang.planner.shapes import Gpu, ModelShape


@dataclass(frozen=True)
class Efficiency:
    """Shares of a GPU's peak that serving reaches; 80 % of bandwidth was measured for paged decode."""

    bandwidth: float = 0.80
    prefill_flops: float = 0.50
    decode_flops: float = 0.70


@dataclass(frozen=True)
class Hardware:
    """One tensor-parallel group."""

    gpu: Gpu
    tp: int = 1
    efficiency: Efficiency = Efficiency()


@dataclass(frozen=True)
class LazyShare:
    """lazy_layers of the model's layers keep lazy_tokens (w_sink + w_recent) tokens; 0 layers: full KV."""

    lazy_layers: int
    lazy_tokens: int


@dataclass(frozen=True)
class Throughput:
    """Times in seconds, rates in tokens/s of the whole group.

    weight_time, compute_time: reading the weights, and multiplying with them; the longer one counts.
    """

    requests: float
    weight_time: float
    compute_time: float
    kv_time: float
    prefill_time: float
    decode_rate: float
    total_rate: float


def decode_bound(tokens: float, lazy_share: float, lazy_tokens: int) -> float:
    """Highest decode ratio, hybrid to full KV, of requests of ``tokens``: 1 to 1 / (1 - lazy_share)."""
    return tokens / ((1 - lazy_share) * tokens + lazy_share * min(tokens, lazy_tokens))


def kv_bytes(shape: ModelShape, tokens: float, lazy: LazyShare, element_bytes: int = 2, tp: int = 1) -> float:
    """KV bytes one request of ``tokens`` holds on one rank."""
    full = (shape.layers - lazy.lazy_layers) * tokens
    return shape.kv_token_layer(element_bytes, tp) * (full + lazy.lazy_layers * min(tokens, lazy.lazy_tokens))


def throughput(
    shape: ModelShape,
    hardware: Hardware,
    lazy: LazyShare,
    requests: float,
    input_tokens: int,
    output_tokens: int,
    element_bytes: int = 2,
) -> Throughput:
    """``mixed_throughput`` of requests of one length."""
    one = (Part(input_tokens, output_tokens),)
    return mixed_throughput(shape, hardware, lazy, requests, one, element_bytes)


def mixed_throughput(
    shape: ModelShape,
    hardware: Hardware,
    lazy: LazyShare,
    requests: float,
    mix: Mix,
    element_bytes: int = 2,
) -> Throughput:
    """Steady decode of ``requests`` at once, halfway through their output, and the rate with prefill.

    element_bytes: bytes of one K or V number. prefill_time: of a request of the mix on average.
    """
    efficiency, gpu, tp = hardware.efficiency, hardware.gpu, hardware.tp
    bandwidth = gpu.bandwidth * efficiency.bandwidth
    flops = tp * gpu.flops
    held = sum(
        weight * kv_bytes(shape, part.input_tokens + part.output_tokens / 2, lazy, element_bytes, tp)
        for weight, part in zip(running(mix), mix, strict=True)
    )
    weight_time = shape.total_weight_bytes / tp / bandwidth
    compute_time = 2 * shape.multiplied_params * requests / (flops * efficiency.decode_flops)
    kv_time = requests * held / bandwidth
    step = max(weight_time, compute_time) + kv_time
    whole = sum(part.share for part in mix)
    work = sum(part.share * prefill_work(shape, lazy, part.input_tokens) for part in mix) / whole
    outputs = sum(part.share * part.output_tokens for part in mix) / whole
    prefill = work / (flops * efficiency.prefill_flops)
    total = requests * outputs / (requests * prefill + outputs * step) if requests else 0.0
    return Throughput(
        requests=requests,
        weight_time=weight_time,
        compute_time=compute_time,
        kv_time=kv_time,
        prefill_time=prefill,
        decode_rate=requests / step if requests else 0.0,
        total_rate=total,
    )


def prefill_work(shape: ModelShape, lazy: LazyShare, tokens: int) -> float:
    """Operations of a prompt: its projections, and two products for each pair of query and key it sees."""
    window = min(tokens, lazy.lazy_tokens)
    pairs = (shape.layers - lazy.lazy_layers) * tokens**2 / 2
    pairs += lazy.lazy_layers * (tokens - window / 2) * window
    return 2 * shape.multiplied_params * tokens + 4 * shape.q_heads * shape.head_dim * pairs
