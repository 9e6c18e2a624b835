"""Memory and time of a training run, before it is started. No torch.

A GPU holds its share of weights, gradients and AdamW's two moments; the inputs of all layers (what gradient
checkpointing keeps) and everything of the layer at work; and, sharded, one or two whole layers in bfloat16.
An
estimate: allocators, kernels' scratch and fragmentation come on top (RESERVE).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lt_sglang.config import LightTransferConfig
from lt_sglang.planner.shapes import GIB, Gpu, ModelShape

RESERVE = 0.06  # of a GPU's memory
# Shares of peak that training reaches: products of large matrices, and FlexAttention forward and backward.
MATMUL_SHARE = 0.50
ATTENTION_SHARE = 0.35
NVLINK = 350e9  # bytes/s of a collective on one GPU
HOST_LINK = 20e9  # bytes/s between a GPU and the host
HOST_ADAM = 0.4e9  # weights a second that one process's AdamW updates in the host's memory
HEAD_TILE = 1.0 * GIB  # logits are made in tiles
BACKWARD = 2.5  # attention's backward, in forwards
LORA_LINEAR = 7  # matrices of a layer that get an adapter


@dataclass(frozen=True)
class TrainJob:
    """What is to be planned. length: tokens of a row; batch: rows a GPU and forward; tokens: of all samples.

    weight_bytes: 4 or 2, of trained weights, gradients and each moment. lora_rank: 0 for all weights.
    gather_bytes: 4 or 2, of a weight that is sent to the other GPUs.
    """

    shape: ModelShape
    gpu: Gpu
    config: LightTransferConfig
    gpus: int = 1
    length: int = 8192
    batch: int = 1
    accumulate: int = 1
    weight_bytes: int = 4
    checkpointing: bool = True
    lora_rank: int = 0
    gather_bytes: int = 4
    offload: bool = False
    tokens: float | None = None
    epochs: float = 1.0

    @property
    def sent_bytes(self) -> int:
        """Of a weight on its way to the other GPUs: never more than it is kept in."""
        return min(self.gather_bytes, self.weight_bytes)


@dataclass(frozen=True)
class TrainPlan:
    """Bytes on one GPU, and in the host's memory for it; seconds of a step, lazy and with full attention.

    state: weights, gradients, optimizer. gathered: whole layers. attention_share: of the step's operations.
    """

    state: float
    gathered: float
    activations: float
    host: float
    total: float
    fits: bool
    step_seconds: float
    full_step_seconds: float
    attention_share: float
    full_attention_share: float
    tokens_a_step: int
    hours: float | None

    @property
    def tokens_a_second(self) -> float:
        """Tokens a second, of all GPUs together."""
        return self.tokens_a_step / self.step_seconds


def plan_training(job: TrainJob) -> TrainPlan:
    """The estimate."""
    shape = job.shape
    hidden = shape.q_heads * shape.head_dim
    layer = shape.params / shape.layers
    state = _state_bytes(job, hidden) / job.gpus
    # One process keeps bfloat16 copies of all weights during a step (autocast); several gather two layers,
    # and have such copies of these if they came in float32.
    gathered = 2 * shape.params * (not job.lora_rank)
    if job.gpus > 1:
        copy = 2 if job.sent_bytes > 2 else 0
        gathered = (job.sent_bytes + copy) * (2 * layer + 0.03 * shape.params)
    rows = job.batch * job.length
    width = job.sent_bytes if job.gpus > 1 else 4  # bytes of the residual stream
    inside = rows * _inside(shape, hidden)
    kept = rows * hidden * width * shape.layers
    activations = (kept + inside if job.checkpointing else kept + inside * shape.layers) + HEAD_TILE
    on_gpu = 0.0 if job.offload else state
    total = on_gpu + gathered + activations + RESERVE * job.gpu.memory
    full = LightTransferConfig((), sink_tokens=job.config.sink_tokens, recent_tokens=job.config.recent_tokens)
    seconds, share = _step(job, job.config)
    full_seconds, full_share = _step(job, full)
    step_tokens = rows * job.gpus * job.accumulate
    hours = job.tokens * job.epochs / step_tokens * seconds / 3600 if job.tokens is not None else None
    return TrainPlan(
        state=on_gpu,
        gathered=gathered,
        activations=activations,
        host=state if job.offload else 0.0,
        total=total,
        fits=total <= job.gpu.memory,
        step_seconds=seconds,
        full_step_seconds=full_seconds,
        attention_share=share,
        full_attention_share=full_share,
        tokens_a_step=step_tokens,
        hours=hours,
    )


def as_dict(job: TrainJob, plan: TrainPlan) -> dict[str, Any]:
    """Plain values."""
    values = {name: getattr(plan, name) for name in TrainPlan.__dataclass_fields__}
    return {"length": job.length, **values, "tokens_a_second": plan.tokens_a_second}


def _state_bytes(job: TrainJob, hidden: int) -> float:
    if not job.lora_rank:
        return job.shape.params * job.weight_bytes * 4
    adapters = job.shape.layers * LORA_LINEAR * job.lora_rank * 2 * hidden * 2
    return job.shape.params * 2 + adapters * 16


def _inside(shape: ModelShape, hidden: int) -> float:
    """Bytes a token of what one layer keeps for its backward: 2 a number, norms and the stream 4."""
    kv = shape.kv_heads * shape.head_dim
    attention = hidden * (2 * hidden + 2 * kv)
    active = shape.multiplied_params / shape.layers
    mlp = max(hidden, (active - attention) / (3 * hidden))
    return 2 * (4 * hidden + 3 * kv + 4 * mlp) + 4 * 4 * hidden


def _step(job: TrainJob, config: LightTransferConfig) -> tuple[float, float]:
    """Seconds of a step, and attention's share of its operations."""
    shape, rows = job.shape, job.batch * job.length
    passes = 8 if job.checkpointing else 6
    if job.lora_rank:
        passes -= 2  # no gradients of frozen weights
    products = passes * shape.multiplied_params * rows
    window = min(job.length, config.lazy_tokens)
    lazy = len(config.lazy_layers)
    pairs = (shape.layers - lazy) * job.length**2 / 2 + lazy * (job.length - window / 2) * window
    forwards = 1 + BACKWARD + job.checkpointing
    attention = forwards * 4 * shape.q_heads * shape.head_dim * pairs * job.batch
    flops = job.gpu.flops
    seconds = products / (flops * MATMUL_SHARE) + attention / (flops * ATTENTION_SHARE)
    if job.gpus > 1:
        moved = shape.params * (2 * job.sent_bytes + job.weight_bytes)  # gathered twice, gradients scattered
        seconds = max(seconds, moved / NVLINK)
    seconds *= job.accumulate
    if job.offload:
        part = shape.params / job.gpus
        seconds += job.accumulate * 3 * part * job.weight_bytes / HOST_LINK + part / HOST_ADAM
    return seconds, attention / (attention + products)
