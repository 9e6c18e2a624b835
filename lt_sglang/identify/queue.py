"""One step of the paper's max-priority queue, for every request of a batch whose layers are selected.

The queue of a request is its row of the layer table: the layers in its P full banks. A new layer enters it;
once P + 1 layers contend, the laziest is popped and becomes lazy, and its full bank goes to the new layer.
The popped layer of step ``layer`` always takes streaming bank number ``layer``, so every bank has one owner.
"""

from __future__ import annotations

import torch

NOBODY = -1


def queue_step(
    bank_of: torch.Tensor, laziness: torch.Tensor, sets: torch.Tensor, layer: int, keep: int
) -> torch.Tensor:
    """Let ``layer`` enter the queues of ``sets``; changes ``bank_of``. The reference of the GPU kernel.

    Among equally lazy layers the one with the higher index is popped; NaN counts as laziest. No host
    synchronisation.

    Args:
        bank_of: int32 [capacity, L], rows of ``sets`` valid for layers before ``layer``.
        laziness: float32 [capacity, L], likewise, and for ``layer``.
        sets: int64 [D], distinct rows.
        layer: the one that enters.
        keep: P.

    Returns:
        int64 [D], the popped layers; NOBODY while the queues are not full.
    """
    if layer < keep:
        bank_of[sets, layer] = layer
        return torch.full_like(sets, NOBODY)
    contending = laziness[sets, : layer + 1].nan_to_num(torch.inf, torch.inf, -torch.inf)
    lost = bank_of[sets, :layer] >= keep
    contending[:, :layer].masked_fill_(lost, -torch.inf)
    popped = layer - contending.flip(1).argmax(1)
    freed = bank_of[sets, popped.clamp(max=max(layer - 1, 0))]
    bank_of[sets, layer] = torch.where(popped == layer, layer, freed).to(bank_of.dtype)
    bank_of[sets, popped] = torch.full_like(popped, layer).to(bank_of.dtype)
    return popped
