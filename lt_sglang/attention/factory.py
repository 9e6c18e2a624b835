"""The attention backend named ``lighttransfer``: one per device."""

from __future__ import annotations

from typing import Any

from lt_sglang.attention.runner import HybridRunner
from lt_sglang.errors import LightTransferError


def create(runner: Any) -> Any:
    """Build the backend of ``runner``; raises LightTransferError unless our own runner asks.

    A stock runner here means that the hook on TpModelWorker is not in place, and going on would serve
    full KV.
    """
    if not isinstance(runner, HybridRunner):
        raise LightTransferError(
            "attention backend lighttransfer: the model runner is SGLang's own, so the plug-in's hooks are "
            "not in place in this process; see the log for 'Failed to apply hooks', or run lt-sglang doctor"
        )
    if runner.lt_config.dynamic:
        if runner.device == "cpu":
            from lt_sglang.attention.dynamic_torch import DynamicTorchBackend

            return DynamicTorchBackend(runner)
        from lt_sglang.attention.dynamic_flashinfer import DynamicFlashInferBackend

        return DynamicFlashInferBackend(runner)
    if runner.device == "cpu":
        from lt_sglang.attention.static_torch import LightTransferTorchBackend

        return LightTransferTorchBackend(runner)
    from lt_sglang.attention.static_flashinfer import LightTransferFlashInferBackend

    return LightTransferFlashInferBackend(runner)
