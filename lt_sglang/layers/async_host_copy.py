"""Reads a small device tensor now and then without waiting for the device."""

from __future__ import annotations

import torch


class AsyncHostCopy:
    """The values of a device tensor, one reading late on a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._event: torch.cuda.Event | None = None
        self._host = torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._values: list[float] = self._host.tolist()

    def read(self) -> list[float]:
        """What the copy that the last call began has brought; begins the next one."""
        if not self._tensor.is_cuda:
            return self._tensor.tolist()
        if self._event is not None and not self._event.query():
            return self._values
        if self._event is not None:
            self._values = self._host.tolist()
        self._event = torch.cuda.Event()
        self._host.copy_(self._tensor, non_blocking=True)
        self._event.record()
        return self._values
