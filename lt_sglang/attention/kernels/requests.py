"""The requests of a dynamic prefill, as its kernels see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

DECIDED: tl.constexpr = tl.constexpr(0)
DECIDE: tl.constexpr = tl.constexpr(1)
STAGE: tl.constexpr = tl.constexpr(2)


@dataclass(frozen=True)
class Requests:
    """The requests of a prefill batch on the device; see the module's text. All int32.

    full, streaming: [sum of lengths], slot of every position; streaming 0 where there is none.
    """

    kind: torch.Tensor
    layer_set: torch.Tensor
    prefix: torch.Tensor
    token: torch.Tensor
    offset: torch.Tensor
    sink_set: torch.Tensor
    deciding: torch.Tensor
    full: torch.Tensor
    streaming: torch.Tensor
