"""lt_sglang.memory.weights: every way to change weights is announced before it is taken, also if it fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from lt_sglang.memory.weights import CHANGING, announcing
from lt_sglang.model_runner import LightTransferModelRunner


def stock(**fields: Any) -> WeightUpdater:
    nothing: Any = lambda *_, **__: None  # noqa: E731
    names = ("tp_rank", "device", "gpu_id", "model_config", "custom_weight_loaders", "get_model")
    names += ("update_model_fields", "recapture_cuda_graph", "get_model_runner")
    return WeightUpdater(**dict.fromkeys(names, nothing) | fields)


@pytest.mark.parametrize("name", CHANGING)
def test_announced_before_it_happens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    def change(self: WeightUpdater, *args: Any, **kwargs: Any) -> Any:
        events.append((name, args, kwargs, self.device))
        raise RuntimeError("half of it is loaded")

    monkeypatch.setattr(WeightUpdater, name, change)
    updater = announcing(stock(device="cpu"), lambda: events.append("announced"))
    with pytest.raises(RuntimeError, match="half"):
        getattr(updater, name)(1, key=2)
    assert events == ["announced", (name, (1,), {"key": 2}, "cpu")]


def test_what_changes_nothing_is_not_announced() -> None:
    updater = announcing(stock(), lambda: pytest.fail("announced"))
    assert updater.destroy_weights_update_group("no such group")[0] is False


@pytest.mark.parametrize(
    "name", ["load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter"]
)
def test_adapters_count_as_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, name, lambda self, *args: ("done", args))
    runner: Any = LightTransferModelRunner.__new__(LightTransferModelRunner)
    finished: list[str] = []
    allocator = SimpleNamespace(tree_cache=None)
    object.__setattr__(runner, "token_to_kv_pool_allocator", allocator)
    object.__setattr__(runner, "sink_store", SimpleNamespace(weights=0))
    assert getattr(runner, name)("adapter") == ("done", ("adapter",))
    assert runner.sink_store.weights == 1
    allocator.tree_cache = SimpleNamespace(finish_copies=lambda: finished.append(name))
    getattr(runner, name)("adapter")
    assert finished == [name], "HiCache copies K and V of the old weights"
    object.__setattr__(runner, "sink_store", None)
    assert getattr(runner, name)("adapter") == ("done", ("adapter",)), "a model with no lazy layer"
