"""Planning FlashInfer's wrappers: a plan that the device has not taken yet must not be written over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lt_sglang.attention import static_plans
from lt_sglang.attention.flashinfer_plans import by_head, plan_decode, plan_prefill, plan_ragged
from lt_sglang.attention.indices import Windows
from lt_sglang.attention.static_plans import LazyDecodeUpdater

UPDATER = SimpleNamespace(num_qo_heads=4, num_kv_heads=2, head_dim=8, q_data_type=None, data_type=None)


class Event:
    """A CUDA event; the log tells what happened when."""

    log: list[str]

    def record(self) -> None:
        self.log.append("copy queued")

    def synchronize(self) -> None:
        self.log.append("copy done")


class Wrapper:
    """A FlashInfer wrapper whose pinned memory is written by every plan."""

    is_cuda_graph_enabled = False

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def begin_forward(self, *_: Any, **__: Any) -> None:
        self.log.append("written")


def ragged(wrapper: Any) -> None:
    plan_ragged(UPDATER, wrapper, [3, 2])


def paged(wrapper: Any) -> None:
    plan_prefill(UPDATER, wrapper, [3, 2], [7, 0], torch.zeros(7), causal=True)


def decode(wrapper: Any) -> None:
    indptr = torch.tensor([0, 3, 5])
    plan_decode(UPDATER, wrapper, indptr, torch.zeros(5), torch.ones(2), indptr, None, None)


@pytest.mark.parametrize("plan", [ragged, paged, decode])
def test_a_plan_waits_for_the_copy_of_the_last_one(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(Event, "log", log, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    wrapper, other = Wrapper(log), Wrapper([])
    plan(wrapper)
    assert log == ["written", "copy queued"]
    plan(other)  # another wrapper has memory of its own
    assert log == ["written", "copy queued", "copy queued"]
    plan(wrapper)
    assert log[3:] == ["copy done", "written", "copy queued"]


def test_a_static_decode_step_waits_for_both_plans_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full and lazy layers have a wrapper each; stock SGLang plans the first without waiting."""
    log: list[str] = []
    monkeypatch.setattr(Event, "log", log, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(static_plans, "decode_kv_indices", lambda *_: None)
    updater: Any = object.__new__(LazyDecodeUpdater)
    vars(updater).update(vars(UPDATER), kv_indptr=torch.zeros(2, 3, dtype=torch.int32))
    updater.kv_last_page_len = torch.ones(2, dtype=torch.int32)
    lists = SimpleNamespace(fill=lambda *_, **__: None)
    updater.attn_backend = SimpleNamespace(graph_plans=None, full_lists=lists, lazy_lists=lists)
    updater.runner = SimpleNamespace(windows=lambda: Windows(4, 12), streaming_tables=lambda: None)
    monkeypatch.setattr(static_plans, "kv_indices_buffer", lambda _: None)
    updater.call_begin_forward = lambda wrapper, *_, **__: wrapper.begin_forward()
    wrappers = [Wrapper(log), Wrapper(log)]
    lengths = torch.tensor([40, 9])
    for _ in range(2):
        updater.update_sliding_window(
            lengths, lengths, 49, wrappers, None, None, plan=None, req_pool_indices=torch.tensor([1, 2])
        )
    assert log == ["written", "copy queued"] * 2 + ["copy done", "written", "copy queued"] * 2


def test_queries_stay_where_they_lie() -> None:
    layer = SimpleNamespace(tp_q_head_num=4, head_dim=8)
    row = torch.arange(3.0 * 64).view(3, 64)
    query = by_head(row[:, :32], layer)
    assert query.data_ptr() == row.data_ptr() and query.stride() == (64, 8, 1)
    assert torch.equal(query[1, 2], row[1, 16:24])
    turned = by_head(row.t()[:32].t()[:, ::2], SimpleNamespace(tp_q_head_num=2, head_dim=8))
    assert turned.stride(-1) == 1 and torch.equal(turned[2, 1], row[2, 16:32:2])
