"""The requests of a dynamic prefill, as its kernels see them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

KNOWN: tl.constexpr = tl.constexpr(0)
SELECT: tl.constexpr = tl.constexpr(1)
STAGED: tl.constexpr = tl.constexpr(2)


class Requests(NamedTuple):
    """The requests of a prefill batch on the device. All int32, [requests] where nothing else is said.

    kind: layers/prefill.py. layer_set: row of ``bank_of``. prefix: tokens before this chunk. token: first row
    of its new tokens in the batch. offset: of its positions in ``full`` and ``streaming``.
    sinks: [requests, w_sink], slots of its sink set; -1 without one.
    selecting: number among those whose layers are selected, or -1.
    full, streaming: [sum of lengths], slot of every position; streaming 0 where there is none.
    """

    kind: torch.Tensor
    layer_set: torch.Tensor
    prefix: torch.Tensor
    token: torch.Tensor
    offset: torch.Tensor
    sinks: torch.Tensor
    selecting: torch.Tensor
    full: torch.Tensor
    streaming: torch.Tensor
