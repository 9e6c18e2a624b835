"""K and V of some rows."""

from __future__ import annotations

from typing import NamedTuple

import torch


class KV(NamedTuple):
    """[rows, KV heads, dim] each. Kernels take it as one argument (docs/decisions/kernel-arguments.md)."""

    k: torch.Tensor
    v: torch.Tensor

    def at(self, rows: torch.Tensor) -> KV:
        """A copy of ``rows`` (int [n])."""
        return KV(self.k.index_select(0, rows), self.v.index_select(0, rows))

    def where(self, which: slice | torch.Tensor) -> KV:
        """The rows of a slice or mask."""
        return KV(self.k[which], self.v[which])
