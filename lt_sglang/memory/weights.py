"""Tells when the weights of a model change, whichever way SGLang changes them.

Source: sglang/srt/model_executor/model_runner_components/weight_updater.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

# Its methods after which the model may compute other K and V; tests/contract compares them with SGLang's.
CHANGING = (
    "update_weights_from_disk",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "load_weights_from_distributed",
    "begin_weight_update",
    "end_weight_update",
)


class _AnnouncingUpdater(WeightUpdater):
    """WeightUpdater that calls ``announce`` before each of its methods that changes weights."""

    announce: Callable[[], None]


def _announced(name: str) -> Callable[..., Any]:
    def method(self: _AnnouncingUpdater, *args: Any, **kwargs: Any) -> Any:
        # Before: an update that fails may have changed some weights.
        self.announce()
        return getattr(WeightUpdater, name)(self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in CHANGING:
    setattr(_AnnouncingUpdater, _name, _announced(_name))


def announcing(stock: WeightUpdater, announce: Callable[[], None]) -> WeightUpdater:
    """SGLang's own updater, rebuilt field by field as one that announces changes."""
    fields = {f.name: getattr(stock, f.name) for f in dataclasses.fields(stock) if f.init}
    adopted = _AnnouncingUpdater(**fields)
    object.__setattr__(adopted, "announce", announce)  # it is frozen
    return adopted
