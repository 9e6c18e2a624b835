"""lt_sglang.model_runner without a model: what is done before a forward, and what is refused at the start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner

from lt_sglang import model_runner as module
from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.layers.full_rows import FullRows
from lt_sglang.layers.layer_sets import LayerSetStore
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.layers.prefill_plans import PrefillPlans
from lt_sglang.memory.sinks import SinkStore
from lt_sglang.memory.sizes import Sizes as MemorySizes
from lt_sglang.model_runner import STORED_SINKS, LightTransferModelRunner
from tests.property.cpu import Caches, Sizes, request

CONFIG = LightTransferConfig((1, 3), sink_tokens=2, recent_tokens=6)


class Backend:
    """In place of an attention backend of ours."""

    __module__ = "lt_sglang.anything"


def runner(monkeypatch: pytest.MonkeyPatch, sizes: Sizes | None = None) -> Any:
    """A runner over real pools; events: what happened, in order."""
    made: Any = object.__new__(LightTransferModelRunner)
    caches = Caches(sizes or Sizes())
    events: list[str] = []
    fields = {
        "events": events,
        "caches": caches,
        "lt_config": caches.config,
        "sink_store": caches.sinks,
        "prefills": caches.prefills,
        "dynamic": None,
        "prefill_plans": PrefillPlans(),
        "full_rows": FullRows(64, "cpu"),
        "token_to_kv_pool": caches.allocator.get_kvcache(),
        "token_to_kv_pool_allocator": caches.allocator,
        "kv_cache_configurator": SimpleNamespace(flat_pool=caches.flat),
        "req_to_token_pool": caches.rows,
        "page_size": 1,
        "attn_backend": Backend(),
        "decode_cuda_graph_runner": "graphs",
        "device": "cpu",
    }
    for name, value in fields.items():
        object.__setattr__(made, name, value)

    def forward(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        events.append("forward")
        assert self.sink_store is None or not self.sink_store._pending_rows
        events.append(f"graphs={self.decode_cuda_graph_runner}")
        return batch, args, kwargs

    monkeypatch.setattr(ModelRunner, "forward", forward)
    return made


def batch(mode: ForwardMode = ForwardMode.DECODE, **fields: Any) -> Any:
    nothing = {"rids": None, "extend_prefix_lens_cpu": [], "extend_seq_lens_cpu": []}
    slots = torch.arange(1, 1 + sum(fields.get("extend_seq_lens_cpu", ())))
    return SimpleNamespace(**{"forward_mode": mode, "out_cache_loc": slots, **nothing, **fields})


def capture(made: Any, row: int = 3) -> None:
    """A request takes a set: its sinks are in streaming slots 5 and 6."""
    made.caches.write(True, torch.tensor([5, 6]), torch.tensor([55, 66]))
    made.sink_store.capture("a", ("key",), lambda: row, lambda: torch.tensor([5, 6]))


def test_a_runner_begins_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    monkeypatch.setattr(
        ModelRunner, "__init__", lambda self, *a, **k: events.append((vars(self).copy(), a, k))
    )
    LightTransferModelRunner(1, lt_config=CONFIG, two=2)
    nothing = ("sink_store", "kv_cache_configurator", "dynamic", "prefills", "full_rows")
    known = {"lt_config": CONFIG, **dict.fromkeys(nothing)}
    facts, args, kwargs = events[0]
    assert known.items() <= facts.items() and (args, kwargs) == ((1,), {"two": 2})


def test_sinks_are_filled_before_the_forward_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch)
    capture(made)
    given = batch()
    assert made.forward(given, 1, two=2) == (given, (1,), {"two": 2})
    index = int(made.sink_store.set_of[3])
    assert index >= 0
    slots = made.sink_store.slots_of[index].to(torch.int64)
    assert made.caches.read(True, slots).tolist() == [55, 66] and not {5, 6} & set(slots.tolist())


@pytest.mark.parametrize("alone", [False, True], ids=["overlap", "no overlap"])
def test_sinks_are_copied_behind_the_last_forward(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    """HiCache is about to load into their slots: where forwards run, behind what the scheduler did."""
    made = runner(monkeypatch)
    capture(made)
    events: list[Any] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append((self.name, "waits for", other.name))

    class Device:
        current = Stream("scheduler")

        def current_stream(self) -> Stream:
            return self.current

        @contextmanager
        def stream(self, stream: Stream) -> Iterator[None]:
            events.append(("on", stream.name))
            yield
            events.append(("off", stream.name))

    copied = made.caches.flat.copy_rows
    made.caches.flat.copy_rows = lambda *rows: (events.append("copy"), copied(*rows))
    made.forward_stream = Stream("forward")
    monkeypatch.setattr(module, "get_device_module", Device)
    monkeypatch.setattr(module, "get_schedule", lambda: SimpleNamespace(disable_overlap_schedule=alone))
    made.flush_sinks()
    where = "scheduler" if alone else "forward"
    assert events == [(where, "waits for", "scheduler"), ("on", where), "copy", ("off", where)]
    made.flush_sinks()
    assert events.count("copy") == 1, "once"
    assert int(made.sink_store.set_of[3]) == -1, "the row is told as its forward begins"
    made.forward(batch())
    slots = made.sink_store.slots_of[int(made.sink_store.set_of[3])].to(torch.int64)
    assert made.caches.read(True, slots).tolist() == [55, 66]


def test_layer_sets_are_flushed_before_every_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else rows of req_to_token read the layers of whoever was there before."""
    made = runner(monkeypatch)
    sets = LayerSetStore(4, (1,), 2, 8, "cpu")
    made.dynamic = SimpleNamespace(sets=sets)
    sets.use_default("a")
    sets.place("a", 3)
    sets._pending[3] = 2
    for mode in (ForwardMode.DECODE, ForwardMode.EXTEND):
        sets._pending[3] = 2
        sets.set_of[3] = 0
        made.forward(batch(mode))
        assert int(sets.set_of[3]) == 2 and not sets._pending, mode


def test_without_lazy_layers_it_is_sglangs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch)
    made.sink_store = None
    made.forward(batch())
    assert made.events[0] == "forward"


def test_a_decode_that_does_not_fit_its_graph_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch)
    made.dynamic = SimpleNamespace(sets=LayerSetStore(4, (1,), 2, 8, "cpu"))
    made.attn_backend.fits_graph = lambda given: given.fits
    for mode, fits, graphs in (
        (ForwardMode.DECODE, True, "graphs"),
        (ForwardMode.DECODE, False, None),
        (ForwardMode.EXTEND, False, "graphs"),
    ):
        given = batch(mode, fits=fits)
        assert made.forward(given, 7, x=8) == (given, (7,), {"x": 8})
        assert made.events[-1] == f"graphs={graphs}" and made.decode_cuda_graph_runner == "graphs"
    made.prefill_plans.put([])
    made.forward(batch(fits=False))
    del made.attn_backend.fits_graph
    made.forward(batch())
    assert made.events[-1] == "graphs=graphs"

    def fail(*_: Any) -> None:
        raise ValueError("out of memory")

    made.attn_backend.fits_graph = lambda given: False
    monkeypatch.setattr(ModelRunner, "forward", fail)
    with pytest.raises(ValueError, match="out of memory"):
        made.forward(batch())
    assert made.decode_cuda_graph_runner == "graphs", "put back whatever happens"


def extend(*requests: Any, rids: Any = None) -> Any:
    return batch(
        ForwardMode.EXTEND,
        reqs=list(requests),
        rids=[req.rid for req in requests] if rids is None else rids,
        extend_prefix_lens_cpu=[req.prefix_len for req in requests],
        extend_seq_lens_cpu=[req.extend_end - req.prefix_len for req in requests],
    )


def admitted(rid: str, length: int, row: int) -> Any:
    req = request(rid, list(range(length)))
    req.prefix_len, req.extend_end, req.kv.req_pool_idx = 0, length, row
    return req


def test_a_prefill_is_planned_once_and_its_plan_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch, Sizes(dynamic=True))
    made.dynamic = SimpleNamespace(sets=made.prefills.sets)
    one, two = admitted("a", 20, 1), admitted("HEALTH_CHECK_b", 3, 2)
    given = extend(one, two)
    made.begin_batch(given)
    plans = made.prefill_plans.of(given)
    assert [(plan.kind, plan.row, plan.end) for plan in plans] == [(Kind.SELECT, 1, 20), (Kind.KNOWN, 2, 3)]
    assert made.prefills.sets.stats.short == 0, "a health check is no short prompt"
    made.forward(given)
    assert made.prefill_plans._plans is None
    assert made.full_rows.leading(torch.arange(1, 24)) == 20, "those of the one that is selected for"
    short = extend(admitted("s", 2, 3))
    made.begin_batch(short)
    assert made.prefills.sets.stats.short == 1
    made.begin_batch(batch(ForwardMode.DECODE, reqs=[one]))
    short.out_cache_loc = torch.tensor([10, 11])
    made.forward(short)
    assert made.full_rows.leading(torch.arange(1, 24)) == 9, "a short prompt's are not"
    made.forward(batch(out_cache_loc=torch.tensor([5])))
    assert made.full_rows.leading(torch.arange(1, 24)) == 4, "nor a decoded token's"
    with pytest.raises(LightTransferError, match="a batch of requests runs that was not planned"):
        made.prefill_plans.of(given)


def test_the_plan_must_be_of_the_batch_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch, Sizes(dynamic=True))
    one = admitted("a", 20, 1)
    made.begin_batch(extend(one))
    with pytest.raises(LightTransferError, match="is not the one that was planned"):
        made.prefill_plans.of(extend(admitted("b", 19, 2)))
    later = extend(one)
    later.extend_prefix_lens_cpu, later.extend_seq_lens_cpu = [1], [19]
    with pytest.raises(LightTransferError, match="is not the one that was planned"):
        made.prefill_plans.of(later)


def test_a_warm_up_run_uses_the_default_set(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch, Sizes(dynamic=True))
    given = batch(
        ForwardMode.EXTEND,
        rids=None,
        extend_prefix_lens_cpu=torch.tensor([4, 0]),
        extend_seq_lens_cpu=torch.tensor([3, 5]),
    )
    assert made.prefill_plans.of(given) == [
        Prefill(Kind.KNOWN, 0, 0, 4, 3),
        Prefill(Kind.KNOWN, 0, 0, 0, 5),
    ]


def test_in_static_mode_nothing_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch)
    made.begin_batch(extend(admitted("a", 20, 1)))
    assert made.prefill_plans._plans is None


def test_windows_and_tables_are_those_of_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch)
    assert vars(made.windows()) == {"sink_tokens": 2, "recent_tokens": 6}
    tables = made.streaming_tables()
    assert tables.req_to_token is made.caches.rows.req_to_token
    assert tables.full_to_streaming is made.caches.allocator.full_to_swa_index_mapping
    assert tables.sink_set_of is made.sink_store.set_of
    assert tables.sink_slots_of is made.sink_store.slots_of


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch)
    monkeypatch.setattr(ModelRunner, "init_attention_backends", lambda self: self.events.append("init"))
    made.init_attention_backends()
    assert made.events == ["init"]
    made.attn_backend = SimpleNamespace()
    with pytest.raises(LightTransferError, match="SGLang built SimpleNamespace, which knows no lazy"):
        made.init_attention_backends()


COMPLETE = SimpleNamespace(complete=True)


def allocated(
    monkeypatch: pytest.MonkeyPatch,
    config: LightTransferConfig,
    streaming: list[int],
    flat_pool: Any = COMPLETE,
) -> Any:
    made = runner(monkeypatch)
    made.sink_store, made.lt_config = None, config
    made.layer_info = SimpleNamespace(swa_attention_layer_ids=streaming)
    made.kv_cache_configurator = SimpleNamespace(flat_pool=flat_pool)

    def alloc(self: Any, *given: Any, **named: Any) -> None:
        assert (given, named) == (("config",), {"more": 1})
        self.events.append("alloc")

    monkeypatch.setattr(ModelRunner, "alloc_memory_pool", alloc)
    monkeypatch.setattr(LightTransferModelRunner, "_init_dynamic", lambda self: self.events.append("dynamic"))
    made.alloc_memory_pool("config", more=1)
    return made


@pytest.mark.parametrize("flat_pool", [None, SimpleNamespace(complete=False)])
def test_pools_that_are_not_in_the_memory_of_lazy_layers_are_refused(
    monkeypatch: pytest.MonkeyPatch, flat_pool: Any
) -> None:
    with pytest.raises(LightTransferError, match="did not build its pools in the memory of lazy layers"):
        allocated(monkeypatch, CONFIG, [1, 3], flat_pool)


def test_sink_sets_are_made_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    made = allocated(monkeypatch, CONFIG, [1, 3])
    store = made.sink_store
    assert isinstance(store, SinkStore) and made.events == ["alloc"]
    rows = made.caches.rows.req_to_token.shape[0]
    assert (store.capacity, store.sink_tokens, store.device) == (STORED_SINKS * rows, 2, "cpu")
    assert len(store.set_of) == rows and made.caches.allocator.sink_store is store
    assert store._source is made.caches.allocator.sinks
    assert allocated(monkeypatch, LightTransferConfig(()), []).sink_store is None
    dynamic = LightTransferConfig((1, 3), mode="dynamic", keep=2)
    assert allocated(monkeypatch, dynamic, [1, 3]).events == ["alloc", "dynamic"]
    with pytest.raises(LightTransferError, match=r"made layers \[1\] streaming, asked for \[1, 3\]"):
        allocated(monkeypatch, CONFIG, [1])


def test_the_configurator_is_ours_where_layers_are_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    def stock(self: Any, layout: Any = None) -> None:
        self.kv_cache_configurator = ("stock", layout)

    monkeypatch.setattr(ModelRunner, "init_kv_cache_configurator", stock)
    monkeypatch.setattr(module.LightTransferKVCacheConfigurator, "adopt", lambda *given: ("ours", *given))
    made = runner(monkeypatch)
    made.init_kv_cache_configurator("layout")
    assert made.kv_cache_configurator == ("ours", ("stock", "layout"), made.lt_config)
    made.lt_config = LightTransferConfig(())
    made.init_kv_cache_configurator("layout")
    assert made.kv_cache_configurator == ("stock", "layout")


def test_what_server_info_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch)
    capture(made)
    allocator = made.caches.allocator
    sizes = MemorySizes(allocator.shape, 220, 8, allocator.demand, None, 90)
    made.kv_cache_configurator.sizes = sizes
    allocator.alloc(3)
    shown = made.describe()
    assert shown["num_lazy_layers"] == 1 and shown["attention_backend"] == "Backend"
    assert shown["sink_tokens"] == 2 and shown["sinks"]["captured"] == 1 and "layer_sets" not in shown
    assert shown["memory"] == {
        "units": 220,
        "units_free": 220 - 2 * 3 - 2,
        "unit_bytes": 8,
        "demand": allocator.demand.to_dict(),
        "full_slots_used": 3,
        "streaming_slots_used": 3,
        "longest_request": 90,
        "full_limit": None,
        "sink_sets": 8,
        "sink_sets_used": 1,
        "sink_sets_in_use": 1,
        "sink_requests": 1,
    }
    json.dumps(shown)
    sets = LayerSetStore(4, (1,), 2, 8, "cpu")
    sets.use_default("b")
    made.dynamic = SimpleNamespace(sets=sets)
    shown = made.describe()
    assert shown["layer_sets"]["short"] == shown["layer_sets"]["requests"] == 1
    made.sink_store = made.dynamic = None
    assert "memory" not in made.describe()
