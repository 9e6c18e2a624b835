"""identify/queue.py as a Triton kernel: one step for every request whose layers are selected."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["layer"])
def _queue_step(  # type: ignore[no-untyped-def]
    bank_of_ptr,
    laziness_ptr,
    sets_ptr,
    score_ptr,
    popped_ptr,
    layer,
    LAYERS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    table = tl.load(sets_ptr + request).to(tl.int64) * LAYERS
    score = tl.load(score_ptr + request)
    score = tl.where(score == score, score, float("inf"))  # a NaN must not find its way into an index
    tl.store(laziness_ptr + table + layer, score)
    if layer < KEEP:
        tl.store(bank_of_ptr + table + layer, layer)
        tl.store(popped_ptr + request, -1)
    else:
        item = tl.arange(0, BLOCK)
        earlier = item < layer
        bank = tl.load(bank_of_ptr + table + item, mask=earlier, other=KEEP)
        laziness = tl.load(laziness_ptr + table + item, mask=earlier, other=0.0)
        contends = (earlier & (bank < KEEP)) | (item == layer)
        laziness = tl.where(item == layer, score, laziness)
        laziness = tl.where(contends, laziness, float("-inf"))
        most = tl.max(laziness, 0)
        popped = tl.max(tl.where(contends & (laziness == most), item, -1), 0)
        freed = tl.max(tl.where(item == popped, bank, -1), 0)
        tl.store(bank_of_ptr + table + popped, layer)
        if popped != layer:
            tl.store(bank_of_ptr + table + layer, freed)
        tl.store(popped_ptr + request, popped)


def queue_step(
    bank_of: torch.Tensor,
    laziness: torch.Tensor,
    sets: torch.Tensor,
    score: torch.Tensor,
    popped: torch.Tensor,
    layer: int,
    keep: int,
) -> None:
    """As ``queue.queue_step``; also stores ``score`` (float32 [D]) as the laziness of ``layer``.

    sets: int32 [D]. popped: int32 [D], written.
    """
    layers = bank_of.shape[1]
    _queue_step[(len(sets),)](
        bank_of,
        laziness,
        sets,
        score,
        popped,
        layer,
        LAYERS=layers,
        KEEP=keep,
        BLOCK=triton.next_power_of_2(layers),
        num_warps=1,
    )
