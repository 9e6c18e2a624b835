"""Lists of an FA3 prefill plan that are empty in some layers.

One plan serves all layers, but in dynamic mode a request is full in some of them and lazy in the others. FA2
reads where a list begins and ends when it runs; FA3 keeps each list's length in its plan, so there the plan's
lengths are exchanged before every layer. A list of length 0 costs next to nothing.

Source: flashinfer/data/include/flashinfer/attention/scheduler.cuh, PrefillSM90Plan: one entry for each tile
of queries and each head, with its request and the length of that request's list.
"""

from __future__ import annotations

from typing import Any

import torch

from lt_sglang.errors import LightTransferError

# PrefillPlanSM90Info: where arrays lie in the integer workspace, in bytes.
_KV_LEN, _HEAD_INDICES, _BATCH_INDICES, _FIELDS = 4, 5, 7, 9


class LayerLengths:
    """The lengths of an FA3 plan, layer by layer.

    Args:
        wrapper: a prefill wrapper that was just planned, for FA3.
        full: bool [L, bs] on its device, whether a layer attends to a request's list.

    Raises:
        LightTransferError: the plan is not FA3's as this version of FlashInfer makes it.
    """

    def __init__(self, wrapper: Any, full: torch.Tensor) -> None:
        info = [int(field) for field in wrapper._plan_info]
        if len(info) != _FIELDS or not 0 < info[_KV_LEN] < info[_HEAD_INDICES] < info[_BATCH_INDICES]:
            raise LightTransferError(
                f"FlashInfer's prefill plan {info} is not FA3's; use flashinfer-python 0.7.2"
            )
        workspace = wrapper._int_workspace_buffer
        size = info[_HEAD_INDICES] - info[_KV_LEN]

        def entries(field: int) -> torch.Tensor:
            view: torch.Tensor = workspace[info[field] : info[field] + size].view(torch.int32)
            return view

        self._lengths = entries(_KV_LEN)
        # Behind the last entry lies, up to the alignment, whatever was there before.
        requests = entries(_BATCH_INDICES).clamp(0, full.shape[1] - 1)
        self._of_layers = self._lengths * full[:, requests.to(torch.int64)]

    def use(self, layer: int) -> None:
        """Let the next run of the wrapper be that of ``layer``; nothing waits for the device."""
        self._lengths.copy_(self._of_layers[layer])
