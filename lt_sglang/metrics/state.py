"""What a scheduler process knows of its lazy layers, as plain numbers.

``read_state`` is the one place that knows where they are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lt_sglang.config import LightTransferConfig

GIB = 1 << 30
FULL, STREAMING, SINK = "full", "streaming", "sink"  # kinds of slots


@dataclass(frozen=True)
class Slots:
    """Slots of one kind on this rank; slot_bytes: K and V of one in all layers it serves."""

    used: int
    cached: int
    slot_bytes: int


@dataclass(frozen=True)
class EngineState:
    """One reading. Counters are totals since the start.

    slots: by kind. capacity_bytes, free_bytes: of the memory that all kinds share. host_bytes: of host
    memory, by kind of slots, or free; empty without HiCache. retractions: by cause.
    extra_token_bytes: KV bytes of one token in the lazy layers, if they kept it.
    requests: finished requests with lazy layers. layer_requests: of them, by lazy layer. scored_requests: of
    them, in dynamic mode, those with layers found in a prompt. laziness: by layer, the sum of their scores.
    identification_seconds: in dynamic mode, what scoring and popping took on this rank's device.
    table_checks: comparisons of the ranks' tables, by result; empty where nothing compares them.
    """

    config: LightTransferConfig
    num_layers: int
    slots: Mapping[str, Slots]
    capacity_bytes: int = 0
    free_bytes: int = 0
    host_bytes: Mapping[str, int] = field(default_factory=dict)
    retractions: Mapping[str, int] = field(default_factory=dict)
    extra_token_bytes: int = 0
    requests: int = 0
    layer_requests: Mapping[int, int] = field(default_factory=dict)
    sink_requests: int = 0
    sink_events: Mapping[str, int] = field(default_factory=dict)
    layer_set_events: Mapping[str, int] = field(default_factory=dict)
    scored_requests: int = 0
    laziness: Sequence[float] = ()
    identification_seconds: float | None = None
    table_checks: Mapping[str, int] = field(default_factory=dict)

    def kv_bytes(self, state: str) -> int:
        """Bytes held by slots that are ``used`` or ``cached``."""
        return sum(getattr(slots, state) * slots.slot_bytes for slots in self.slots.values())

    def saved_bytes(self, state: str) -> int:
        """Bytes by which full attention would hold more: every token of the full layers, in the lazy ones."""
        if STREAMING not in self.slots:
            return 0
        kept = sum(getattr(self.slots[name], state) for name in (STREAMING, SINK))
        return int((getattr(self.slots[FULL], state) - kept) * self.extra_token_bytes)


def read_state(scheduler: Any) -> EngineState | None:
    """Read a scheduler of SGLang's; None if its server was not asked for lazy layers."""
    runner = scheduler.tp_worker.model_runner
    config = getattr(runner, "lt_config", None)
    if config is None:
        return None
    stats = scheduler.pool_stats_observer.get_pool_stats()
    num_layers = runner.model_config.num_hidden_layers
    sinks = runner.sink_store
    if sinks is None:
        # SGLang's own pool.
        slot_bytes = int(runner.token_to_kv_pool.mem_usage * GIB / stats.full_capacity)
        free = stats.full_capacity - stats.full_num_used - stats.full_evictable_size
        return EngineState(
            config=config,
            num_layers=num_layers,
            slots={FULL: Slots(stats.full_num_used, stats.full_evictable_size, slot_bytes)},
            capacity_bytes=stats.full_capacity * slot_bytes,
            free_bytes=free * slot_bytes,
        )
    sizes, allocator = runner.kv_cache_configurator.sizes, runner.token_to_kv_pool_allocator
    token_layer = runner.kv_cache_configurator.token_layer_bytes
    lazy_bytes = sizes.shape.lazy_layers * token_layer
    of_set = sinks.slots_of_set
    requests, host = scheduler.tree_cache.finished_requests, scheduler.tree_cache.host
    layer_requests = dict.fromkeys(config.lazy_layers, requests)
    dynamic = runner.dynamic
    layer_sets = None if dynamic is None else dynamic.sets
    laziness: list[float] = []
    scored = 0
    if layer_sets is not None:
        # There may be no further forward, which would count them; and the copies come behind the sums.
        with runner.behind_forwards():
            layer_sets.count_finished()
            finished, (*laziness, count) = layer_sets.finished.read(), layer_sets.scored.read()
        layer_requests = {layer: int(number) for layer, number in enumerate(finished)}
        scored = int(count)
    return EngineState(
        config=config,
        num_layers=num_layers,
        slots={
            FULL: Slots(
                stats.full_num_used, stats.full_evictable_size, sizes.shape.full_layers * token_layer
            ),
            STREAMING: Slots(stats.swa_num_used, stats.swa_evictable_size, lazy_bytes),
            SINK: Slots(sinks.in_use * of_set, sinks.unused * of_set, lazy_bytes),
        },
        capacity_bytes=sizes.units * sizes.unit_bytes,
        free_bytes=len(allocator.units) * sizes.unit_bytes,
        host_bytes={} if host is None else host.bytes_by_kind(),
        retractions=vars(allocator.retractions),
        extra_token_bytes=lazy_bytes,
        requests=requests,
        layer_requests=layer_requests,
        sink_requests=sinks.requests,
        sink_events=vars(sinks.stats),
        layer_set_events={} if layer_sets is None else vars(layer_sets.stats),
        scored_requests=scored,
        laziness=laziness,
        identification_seconds=None if dynamic is None else dynamic.stopwatch.read(),
        table_checks=vars(dynamic.table_checks) if config.dynamic and config.check_tables else {},
    )
