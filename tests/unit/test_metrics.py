"""lt_sglang.metrics: the frozen list of names, what a reading becomes, and when one is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import prometheus_client
import pytest

from lt_sglang import metrics
from lt_sglang.config import LightTransferConfig
from lt_sglang.metrics.catalog import CATALOG, Kind, Scope
from lt_sglang.metrics.publisher import INTERVAL_SECONDS, Publisher, Ticker, samples
from lt_sglang.metrics.state import EngineState, Slots, read_state

ROOT = Path(__file__).resolve().parents[2]
FROZEN = Path(__file__).with_name("metrics.json")
LABELS = {"model_name": "m", "tp_rank": 0}


def state(**changes: object) -> EngineState:
    """A model of 4 layers, 1 and 3 lazy, one rank, two K and V bytes a token and layer."""
    given: dict[str, object] = {
        "config": LightTransferConfig((1, 3), sink_tokens=4, recent_tokens=60),
        "num_layers": 4,
        "slots": {"full": Slots(500, 200, 4), "streaming": Slots(90, 30, 4), "sink": Slots(8, 4, 4)},
        "capacity_bytes": 4000,
        "free_bytes": 672,
        "host_bytes": {"full": 640, "streaming": 96, "sink": 32, "free": 232},
        "retractions": {"memory": 2, "limit": 0, "other": 1},
        "extra_token_bytes": 4,
        "requests": 7,
        "layer_requests": {1: 7, 3: 7},
        "sink_requests": 2,
        "sink_events": {"captured": 3, "shared": 2, "evicted": 0, "refused": 1},
        "layer_set_events": {"decided": 4, "inherited": 3},
        "scored_requests": 6,
        "laziness": [-0.5, 1.5, 0.0, 3.0],
        "identification_seconds": 0.25,
        "table_checks": {"same": 4, "different": 0},
    }
    return EngineState(**{**given, **changes})  # type: ignore[arg-type]


def published(*states: EngineState, first_rank: bool = True) -> prometheus_client.CollectorRegistry:
    registry = prometheus_client.CollectorRegistry()
    publisher = Publisher(LABELS, first_rank=first_rank, registry=registry)
    for reading in states:
        publisher.publish(reading)
    return registry


def value(registry: prometheus_client.CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"model_name": "m", "tp_rank": "0", **labels})


def test_names_types_and_labels_are_frozen() -> None:
    """Dashboards and alerts of others read them: add here, never rename."""
    found = {
        metric.name: {"type": metric.kind.value, "from": metric.scope.value, "labels": list(metric.labels)}
        for metric in CATALOG
    }
    assert found == json.loads(FROZEN.read_text(encoding="utf-8"))


def test_names_are_well_formed() -> None:
    for metric in CATALOG:
        assert re.fullmatch(r"lt_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert metric.help.endswith(".")


def test_every_metric_gets_a_sample() -> None:
    assert {metric.name for metric, _, _ in samples(state())} == {metric.name for metric in CATALOG}
    for metric, values, _ in samples(state()):
        assert len(values) == len(metric.labels)


def test_operations_manual_documents_every_metric() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert [metric.name for metric in CATALOG if f"`{metric.name}`" not in text] == []
    assert set(re.findall(r"`(lt_[a-z_]+)`", text)) <= {metric.name for metric in CATALOG}


def test_bytes_held_and_saved() -> None:
    registry = published(state())
    kinds = ("full", "streaming", "sink")
    for held, slots in (("used", (500, 90, 8)), ("cached", (200, 30, 4))):
        assert [value(registry, "lt_kv_slots", kind=kind, state=held) for kind in kinds] == [*slots]
        found = [value(registry, "lt_kv_bytes", kind=kind, state=held) for kind in kinds]
        assert found == [4 * count for count in slots]
    # All layers full: 500 tokens in the two lazy layers as well, instead of 90 + 8.
    assert value(registry, "lt_kv_saved_bytes", state="used") == 4 * (500 - 98)
    assert value(registry, "lt_kv_saved_bytes", state="cached") == 4 * (200 - 34)
    # Used, cached and free are all there is.
    assert value(registry, "lt_kv_capacity_bytes") == 4 * (598 + 234) + 672
    assert value(registry, "lt_kv_free_bytes") == 672
    assert value(registry, "lt_host_kv_bytes", kind="streaming") == 96


def test_no_lazy_layer_saves_nothing() -> None:
    stock = state(config=LightTransferConfig(()), slots={"full": Slots(500, 0, 0)}, layer_requests={})
    assert value(published(stock), "lt_kv_saved_bytes", state="used") == 0
    assert value(published(stock), "lt_layers", kind="lazy") == 0


def scheduler_of(**runner: object) -> SimpleNamespace:
    """What read_state looks at of a scheduler without lazy layers."""
    stats = SimpleNamespace(full_capacity=1000, full_num_used=40, full_evictable_size=60)
    return SimpleNamespace(
        tp_worker=SimpleNamespace(
            model_runner=SimpleNamespace(model_config=SimpleNamespace(num_hidden_layers=4), **runner)
        ),
        pool_stats_observer=SimpleNamespace(get_pool_stats=lambda: stats),
    )


def test_layers_are_counted_before_they_are_copied_where_forwards_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last requests have no forward behind them; a copy on another stream could be ahead of the sums."""
    events: list[str] = []

    @contextmanager
    def behind_forwards() -> Iterator[None]:
        events.append("on")
        yield
        events.append("off")

    def read(name: str, values: list[float]) -> SimpleNamespace:
        return SimpleNamespace(read=lambda: events.append(name) or values)

    sets = SimpleNamespace(
        count_finished=lambda: events.append("count"),
        finished=read("finished", [1, 0, 2, 2]),
        scored=read("scored", [0.5, 0.0, 1.0, 1.5, 2]),
        stats=SimpleNamespace(decided=2),
    )
    shape = SimpleNamespace(lazy_layers=2, full_layers=2)
    sizes = SimpleNamespace(shape=shape, units=10, unit_bytes=4)
    scheduler = scheduler_of(
        lt_config=LightTransferConfig((1, 2), mode="dynamic"),
        sink_store=SimpleNamespace(slots_of_set=4, in_use=0, unused=0, requests=0, stats=SimpleNamespace()),
        kv_cache_configurator=SimpleNamespace(sizes=sizes, token_layer_bytes=8),
        token_to_kv_pool_allocator=SimpleNamespace(units=[1], retractions=SimpleNamespace()),
        dynamic=SimpleNamespace(sets=sets, stopwatch=SimpleNamespace(read=lambda: 0.0)),
        behind_forwards=behind_forwards,
    )
    scheduler.tree_cache = SimpleNamespace(finished_requests=2, host=None)
    vars(scheduler.pool_stats_observer.get_pool_stats()).update(swa_num_used=0, swa_evictable_size=0)
    found = read_state(scheduler)
    assert events == ["on", "count", "finished", "scored", "off"]
    assert found is not None and found.layer_requests == {0: 1, 1: 0, 2: 2, 3: 2}
    assert found.scored_requests == 2 and found.laziness == [0.5, 0.0, 1.0, 1.5]


def test_a_stock_engine_has_no_state() -> None:
    assert read_state(scheduler_of()) is None


def test_an_engine_without_lazy_layers_has_one_kind_of_slots() -> None:
    """Of SGLang's own pool, so that the alert on full memory is of this engine too."""
    pool = SimpleNamespace(mem_usage=8000 / 2**30)
    config = LightTransferConfig(())
    found = read_state(scheduler_of(lt_config=config, sink_store=None, token_to_kv_pool=pool))
    assert found is not None and found.slots == {"full": Slots(40, 60, 8)}
    registry = published(found)
    assert value(registry, "lt_layers", kind="full") == 4
    assert value(registry, "lt_kv_capacity_bytes") == 8000 and value(registry, "lt_kv_free_bytes") == 7200
    assert value(registry, "lt_retractions_total", cause="memory") is None, (
        "SGLang counts them, without causes"
    )


def test_totals_become_counters() -> None:
    registry = published(state(requests=7), state(requests=9), state(requests=9))
    assert value(registry, "lt_requests_total", mode="static") == 9
    again = published(state(requests=7), state(requests=2))
    assert value(again, "lt_requests_total", mode="static") == 9, "2 more after a restart of the count"
    assert value(registry, "lt_sink_sets_total", event="refused") == 1
    assert value(registry, "lt_retractions_total", cause="memory") == 2
    assert value(registry, "lt_retractions_total", cause="limit") == 0, "an alert needs a beginning"


def test_what_only_dynamic_mode_has() -> None:
    registry = published(
        state(), state(identification_seconds=0.75, table_checks={"same": 5, "different": 1})
    )
    assert value(registry, "lt_identification_seconds_total") == 0.75
    assert value(registry, "lt_table_checks_total", result="same") == 5
    assert value(registry, "lt_table_checks_total", result="different") == 1
    static = published(state(identification_seconds=None, table_checks={}))
    assert value(static, "lt_identification_seconds_total") is None
    assert value(static, "lt_table_checks_total", result="same") is None


def test_different_tables_are_published_before_the_engine_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """It then waits for two scrapes at the interval of the charts, and longer."""
    done: list[str] = []
    monkeypatch.setattr(metrics, "read_state", lambda scheduler: done.append("read") or None)
    monkeypatch.setattr(metrics.time, "sleep", lambda seconds: done.append(f"wait {seconds}"))
    dynamic = SimpleNamespace(before_stop=None)
    runner = SimpleNamespace(dynamic=dynamic)
    reporter = SimpleNamespace(scheduler=SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner)))
    ticker = metrics.ticker_for(reporter)
    ticker.tick(is_idle=False)
    assert dynamic.before_stop is not None
    dynamic.before_stop()
    assert done == ["read", "read", f"wait {metrics.LAST_SCRAPES_SECONDS}"]
    assert metrics.LAST_SCRAPES_SECONDS > 2 * 15


def test_other_ranks_publish_their_memory_only() -> None:
    registry = published(state(), first_rank=False)
    assert value(registry, "lt_kv_slots", kind="full", state="used") == 500
    names = {sample.name for family in registry.collect() for sample in family.samples}
    by_scope = {metric.name for metric in CATALOG if metric.scope is Scope.RANK}
    assert {name for name in names if not name.endswith("_created")} == by_scope


def test_a_tick_a_second_and_one_when_idle() -> None:
    now, taken = [100.0], []
    ticker = Ticker(lambda: taken.append(now[0]), clock=lambda: now[0])
    for busy_at in (100.0, 100.2, 100.9):
        now[0] = busy_at
        ticker.tick(is_idle=False)
    assert taken == [100.0]
    now[0] = 100.95
    ticker.tick(is_idle=True)
    ticker.tick(is_idle=True)
    assert taken == [100.0, 100.95], "at once when idle, and once"
    now[0] += INTERVAL_SECONDS
    ticker.tick(is_idle=True)
    assert len(taken) == 3


def test_a_fault_ends_the_metrics_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise ValueError("broken")

    ticker = Ticker(fail, clock=lambda: len(calls) * 10.0)
    ticker.tick(is_idle=False)
    ticker.tick(is_idle=False)
    assert len(calls) == 1
    assert "the engine goes on" in caplog.text
