"""Which slots hold K and V that were computed with full attention in every layer.

A request that inherits layers reads two kinds of rows with its cached prefix: those that its layers were
selected over, and behind them those that earlier heirs of the same layers computed with streaming attention.
Where the one kind ends depends on what was evicted in between, and on whose slots the prefix cache keeps
where two requests computed the same tokens. A request that is retracted must compute each row again as it
was, so every slot says how its row was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from lt_sglang.layers.prefill import Kind, Prefill


class FullRows:
    """A flag for each slot. Forwards write it on their own stream, in the order in which they write K and V.

    Args:
        slots: full slots there are, padding included.
        device: of the table.

    Attributes:
        table: bool [slots].
    """

    def __init__(self, slots: int, device: str) -> None:
        self.table = torch.zeros(slots, dtype=torch.bool, device=device)

    def prefill(self, slots: torch.Tensor, plans: Sequence[Prefill]) -> None:
        """A prefill writes ``slots`` (int64 [tokens]): one request of ``plans`` after the other."""
        start = 0
        for known, group in groupby(plans, key=lambda plan: plan.kind == Kind.KNOWN):
            end = start + sum(plan.extend for plan in group)
            self.table.index_fill_(0, slots[start:end], not known)
            start = end

    def decode(self, slots: torch.Tensor) -> None:
        """A decode step writes ``slots`` (int64 [requests])."""
        self.table.index_fill_(0, slots, False)

    def leading(self, slots: torch.Tensor) -> int:
        """How many of ``slots`` (int64 [n]), from the first on, are such; waits for the device."""
        return int(self.table[slots].to(torch.int32).cumprod(0).sum())
