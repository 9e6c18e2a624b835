"""Turns readings into Prometheus metrics, at most one a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lt_sglang import __version__
from lt_sglang.config import format_layers
from lt_sglang.metrics import catalog
from lt_sglang.metrics.catalog import CATALOG, Kind, Metric, Scope
from lt_sglang.metrics.state import EngineState

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0
STATES = ("used", "cached")

Sample = tuple[Metric, tuple[str, ...], float]


def samples(state: EngineState) -> Iterator[Sample]:
    """Every (metric, label values, value) of a reading."""
    config = state.config
    lazy = len(config.lazy_layers)
    yield catalog.BUILD_INFO, (__version__, _sglang_version()), 1
    windows = (str(config.sink_tokens), str(config.recent_tokens))
    yield catalog.CONFIG_INFO, (config.mode, format_layers(config.lazy_layers), *windows), 1
    yield catalog.LAYERS, ("full",), state.num_layers - lazy
    yield catalog.LAYERS, ("lazy",), lazy
    for kind, slots in state.slots.items():
        for held in STATES:
            yield catalog.KV_SLOTS, (kind, held), getattr(slots, held)
            yield catalog.KV_BYTES, (kind, held), getattr(slots, held) * slots.slot_bytes
    yield catalog.KV_CAPACITY, (), state.capacity_bytes
    yield catalog.KV_FREE, (), state.free_bytes
    for kind, count in state.host_bytes.items():
        yield catalog.HOST_BYTES, (kind,), count
    for held in STATES:
        yield catalog.KV_SAVED, (held,), state.saved_bytes(held)
    for cause, count in state.retractions.items():
        yield catalog.RETRACTIONS, (cause,), count
    yield catalog.REQUESTS, (config.mode,), state.requests
    for layer, count in state.layer_requests.items():
        yield catalog.LAYER_REQUESTS, (str(layer),), count
    yield catalog.SINK_REQUESTS, (), state.sink_requests
    for event, count in state.sink_events.items():
        yield catalog.SINK_SETS, (event,), count
    for event, count in state.layer_set_events.items():
        yield catalog.LAYER_SETS, (event,), count
    if state.identification_seconds is not None:
        yield catalog.IDENTIFICATION_SECONDS, (), state.identification_seconds
    for result, count in state.table_checks.items():
        yield catalog.TABLE_CHECKS, (result,), count
    if state.laziness:
        yield catalog.SCORED_REQUESTS, (), state.scored_requests
    for layer, total in enumerate(state.laziness):
        yield catalog.LAYER_LAZINESS, (str(layer),), total


class Publisher:
    """Publishes the readings of one rank.

    Args:
        labels: SGLang's labels, on every sample.
        first_rank: whether this rank speaks for the engine.
        registry: where to register; prometheus_client's default one unless a test passes its own.
    """

    def __init__(self, labels: Mapping[str, Any], *, first_rank: bool, registry: Any = None) -> None:
        import prometheus_client  # not earlier: see the package's docstring

        self._labels = {name: str(value) for name, value in labels.items()}
        self._scopes = {Scope.RANK, Scope.ENGINE} if first_rank else {Scope.RANK}
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}
        self._families: dict[str, Any] = {}
        given = {} if registry is None else {"registry": registry}
        for metric in CATALOG:
            names = [*self._labels, *metric.labels]
            if metric.kind is Kind.COUNTER:
                family: Any = prometheus_client.Counter(metric.name, metric.help, names, **given)
            else:
                # One series a rank, told apart by SGLang's labels, not by process id.
                family = prometheus_client.Gauge(
                    metric.name, metric.help, names, multiprocess_mode="mostrecent", **given
                )
            self._families[metric.name] = family

    def publish(self, state: EngineState) -> None:
        """Set every metric to what ``state`` says; a total that went back counts as a new start."""
        for metric, values, value in samples(state):
            if metric.scope not in self._scopes:
                continue
            labels = {**self._labels, **dict(zip(metric.labels, values, strict=True))}
            child = self._families[metric.name].labels(**labels)
            if metric.kind is Kind.GAUGE:
                child.set(value)
                continue
            last = self._totals.get((metric.name, values), 0.0)
            child.inc(value - last if value >= last else value)
            self._totals[metric.name, values] = value


class Ticker:
    """Calls for a reading once a second, and at once when the engine falls idle.

    A fault ends the metrics, not the engine: it is logged, and the alert on missing metrics does the rest.
    """

    def __init__(self, publish: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._publish: Callable[[], None] | None = publish
        self._clock = clock
        self._last = float("-inf")
        self._was_idle = False

    def tick(self, is_idle: bool) -> None:
        """Take a reading if one is due. Called in every round of the scheduler; cheap where none is."""
        if self._publish is None:
            return
        now = self._clock()
        fell_idle = is_idle and not self._was_idle
        self._was_idle = is_idle
        if now - self._last < INTERVAL_SECONDS and not fell_idle:
            return
        self._last = now
        self.publish()

    def publish(self) -> None:
        """Take a reading now, unless an earlier one failed."""
        if self._publish is None:
            return
        try:
            self._publish()
        except Exception:
            self._publish = None
            logger.exception("LightTransfer metrics failed and stop here; the engine goes on")


def _sglang_version() -> str:
    import sglang

    return str(sglang.__version__)
