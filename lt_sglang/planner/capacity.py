"""What fits into the KV memory of one rank, by the arithmetic of the server itself."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.sizes import Sizes, size_memory
from lt_sglang.memory.units import UnitShape
from lt_sglang.planner.roofline import Hardware, LazyShare, decode_bound, kv_bytes, throughput
from lt_sglang.planner.shapes import GIB, ModelShape

# The CUDA context and what else torch does not see: 0.7 GiB were measured on an H100.
RESERVE_BYTES = 0.75 * GIB
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
        if self.kv_bytes is not None:
            return self.kv_bytes
        memory, tp = self.hardware.gpu.memory, self.hardware.tp
        left = memory * self.mem_fraction - RESERVE_BYTES - self.weights_bytes / tp
        if left <= 0:
            raise LightTransferError(
                f"--tp {tp}: {self.weights_bytes / tp / GIB:.1f} GiB of weights on a GPU leave no room for "
                f"KV in {self.mem_fraction:g} of {memory / GIB:.1f} GiB; raise --tp or --mem-fraction-static"
            )
        return int(left)


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


def plan_length(
    deployment: Deployment, input_tokens: int, output_tokens: int, at_most: int | None = None
) -> LengthPlan:
    """Plan requests of ``input_tokens`` + ``output_tokens``; raises LightTransferError if none fits.

    at_most: requests that clients send at once, if memory holds more.
    """
    shape, tp, lazy = deployment.shape, deployment.hardware.tp, deployment.lazy
    tokens = input_tokens + output_tokens
    if shape.max_tokens is not None and tokens > shape.max_tokens:
        raise LightTransferError(
            f"{input_tokens} + {output_tokens} tokens are more than the {shape.max_tokens} of the model's "
            "context (--context-length)"
        )
    none = LazyShare(0, 0)
    budget, element = deployment.kv_budget, deployment.element_bytes
    full_bytes = kv_bytes(shape, tokens, none, element, tp)
    full = hybrid = floor(budget / full_bytes)
    if lazy.lazy_layers:
        context = shape.max_tokens or max(tokens, deployment.chunk_tokens)
        hybrid = floor(sizes_of(deployment, context).requests(input_tokens, output_tokens))
    if at_most is not None:
        full, hybrid = min(full, at_most), min(hybrid, at_most)
    decode_ratio = total_ratio = None
    ours = throughput(shape, deployment.hardware, lazy, hybrid, input_tokens, output_tokens, element)
    stock = throughput(shape, deployment.hardware, none, full, input_tokens, output_tokens, element)
    if full:
        decode_ratio = ours.decode_rate / stock.decode_rate
        total_ratio = ours.total_rate / stock.total_rate
    times = {
        "reading KV": ours.kv_time,
        "reading weights": ours.weight_time if ours.weight_time >= ours.compute_time else 0.0,
        "matrix products": ours.compute_time if ours.compute_time > ours.weight_time else 0.0,
    }
    return LengthPlan(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        full_requests=full,
        hybrid_requests=hybrid,
        bound=decode_bound(tokens, lazy.lazy_layers / shape.layers, lazy.lazy_tokens),
        decode_ratio=decode_ratio,
        total_ratio=total_ratio,
        full_decode=stock.decode_rate,
        hybrid_decode=ours.decode_rate,
        full_prefill=stock.prefill_time,
        hybrid_prefill=ours.prefill_time,
        full_kv_gib=tp * full_bytes / GIB,
        hybrid_kv_gib=tp * kv_bytes(shape, tokens, lazy, element, tp) / GIB,
        limit=max(times, key=times.__getitem__) if hybrid else "KV memory: not one request fits",
    )


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
