"""Runs of consecutive positions, cut for kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """int32 [number, 3]: request, first position, positions."""

    table: torch.Tensor
    number: int


def make_tiles(runs: list[tuple[int, int, int]], block: int, device: torch.device | str) -> Tiles:
    """Cut runs (request, first position, end position) into tiles of at most ``block`` positions."""
    cut = [
        (request, at, min(block, end - at)) for request, first, end in runs for at in range(first, end, block)
    ]
    table = torch.tensor(cut, dtype=torch.int32).reshape(-1, 3)
    return Tiles(table.to(device, non_blocking=True), len(cut))
