"""The attention backend named ``lighttransfer``: one per device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lt_sglang.errors import LightTransferError

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def create(runner: ModelRunner) -> Any:
    """Build the backend of ``runner``; raises LightTransferError unless our own runner asks.

    A stock runner here means that the hook on TpModelWorker is not in place, and going on would serve
    full KV.
    """
    from lt_sglang.model_runner import LightTransferModelRunner

    if not isinstance(runner, LightTransferModelRunner):
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
        from lt_sglang.attention.torch_backend import LightTransferTorchBackend

        return LightTransferTorchBackend(runner)
    from lt_sglang.attention.flashinfer_backend import LightTransferFlashInferBackend

    return LightTransferFlashInferBackend(runner)
