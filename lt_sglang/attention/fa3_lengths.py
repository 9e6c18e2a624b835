"""Lists of an FA3 prefill plan that are empty in some layers.

One plan serves all layers, but in dynamic mode a request is full in some of them and lazy in the others. FA2
reads where a list begins and ends when it runs; FA3 keeps each list's length in its plan, so there the plan's
lengths are exchanged before every layer. A list of length 0 costs next to nothing.

Source: flashinfer/data/include/flashinfer/attention/scheduler.cuh, PrefillSM90Plan.
"""

from __future__ import annotations

from typing import Any

import torch

from lt_sglang.attention.flashinfer_private import int_workspace, sm90_plan_info
from lt_sglang.errors import LightTransferError


class LayerLengths:
    """The lengths of an FA3 plan, layer by layer.

    Args:
        wrapper: a prefill wrapper that was just planned, for FA3.
        full: bool [L, bs] on its device, whether a layer attends to a request's list.

    Raises:
        LightTransferError: the plan is not FA3's as this version of FlashInfer makes it.
    """

    def __init__(self, wrapper: Any, full: torch.Tensor) -> None:
        info, workspace = sm90_plan_info(wrapper), int_workspace(wrapper)
        if not 0 < info.kv_len_offset < info.head_indices_offset < info.batch_indices_offset:
            raise LightTransferError(
                f"FlashInfer's prefill plan {list(info)} is not FA3's; use flashinfer-python 0.7.2"
            )
        size = info.head_indices_offset - info.kv_len_offset
        self._lengths = workspace[info.kv_len_offset :][:size].view(torch.int32)
        # Behind the last entry lies, up to the alignment, whatever was there before.
        requests = workspace[info.batch_indices_offset :][:size].view(torch.int32)
        requests = requests.clamp(0, full.shape[1] - 1)
        self._of_layers = self._lengths * full[:, requests.to(torch.int64)]

    def use(self, layer: int) -> None:
        """Let the next run of the wrapper be that of ``layer``; nothing waits for the device."""
        self._lengths.copy_(self._of_layers[layer])
