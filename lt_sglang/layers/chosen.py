"""Chosen layers on the host: for answers that ask, and for requests that are retracted and come back.

What a forward chooses is on the device. It is copied to pinned memory behind that forward and read once the
request's token, which the same forward made, has been read: by then the copy is done, so nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


class ChosenLayers:
    """Layers of one set. ``banks`` (int) and ``laziness`` (float32 values), by layer."""

    def __init__(self, rows: torch.Tensor, event: torch.cuda.Event | None) -> None:
        """rows: float32 [2, L] on the host, banks and laziness; written once ``event`` has passed."""
        self._rows = rows
        self._event = event

    @classmethod
    def known(cls, banks: Sequence[int], laziness: Sequence[float]) -> ChosenLayers:
        """One that is on the host already."""
        return cls(torch.tensor([list(banks), list(laziness)], dtype=torch.float32), None)

    @property
    def banks(self) -> list[int]:
        """Bank of each layer."""
        return [int(bank) for bank in self._read()[0].tolist()]

    @property
    def laziness(self) -> tuple[float, ...]:
        """The score of each layer; higher is lazier."""
        return tuple(self._read()[1].tolist())

    def _read(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._rows


def bring(bank_of: torch.Tensor, laziness: torch.Tensor, rows: Sequence[int]) -> list[ChosenLayers]:
    """What ``rows`` of both tables ([capacity, L]) will say after the work queued so far."""
    where = torch.tensor(rows, dtype=torch.int64).to(bank_of.device, non_blocking=True)
    found = torch.stack([bank_of[where].to(torch.float32), laziness[where]], dim=1)
    if not found.is_cuda:
        return [ChosenLayers(row, None) for row in found]
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    host.copy_(found, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return [ChosenLayers(row, event) for row in host]


@dataclass(frozen=True)
class Remembered:
    """What a retracted request had, so that it comes back with the same layers.

    uid: its set. default: whether that was the one of short prompts. full_rows: how many of its first tokens
    were computed with full attention in every layer; those after them were not, nor may they be then.
    laziness: by layer.
    """

    uid: int
    default: bool
    full_rows: int
    laziness: tuple[float, ...]


def remember(req: Any, had: Remembered | None) -> None:
    """Keep ``had`` with a request until it ends; None changes nothing."""
    if had is not None:
        req.lighttransfer_memory = had


def remembered(req: Any) -> Remembered | None:
    """What ``req`` (or None) had before it was retracted."""
    had: Remembered | None = getattr(req, "lighttransfer_memory", None)
    return had
