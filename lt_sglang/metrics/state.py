"""What a scheduler process knows of its lazy layers, as plain numbers.

``read_state`` is the one place that knows where they are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lt_sglang.config import LightTransferConfig

FULL, STREAMING, SINK = "full", "streaming", "sink"


@dataclass(frozen=True)
class Pool:
    """Slots of one pool on this rank; slot_bytes: K and V of one slot in all layers the pool serves."""

    capacity: int
    used: int
    cached: int
    slot_bytes: int


@dataclass(frozen=True)
class EngineState:
    """One reading. Counters are totals since the start.

    pools: by name. extra_token_bytes: KV bytes of one token in the lazy layers, if they kept it.
    requests: finished requests with lazy layers. layer_requests: of them, by lazy layer. scored_requests: of
    them, in dynamic mode, those with layers found in a prompt. laziness: by layer, the sum of their scores.
    identification_seconds: in dynamic mode, what scoring and popping took on this rank's device.
    table_checks: comparisons of the ranks' tables, by result; empty where nothing compares them.
    """

    config: LightTransferConfig
    num_layers: int
    pools: Mapping[str, Pool]
    extra_token_bytes: int = 0
    expected_tokens: int = 0
    expected_requests: float = 0.0
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
        return sum(getattr(pool, state) * pool.slot_bytes for pool in self.pools.values())

    def saved_bytes(self, state: str) -> int:
        """Bytes by which full attention would hold more: every token of the full pool, in the lazy layers."""
        if STREAMING not in self.pools:
            return 0
        kept = sum(getattr(self.pools[name], state) for name in (STREAMING, SINK))
        return int((getattr(self.pools[FULL], state) - kept) * self.extra_token_bytes)


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
        full = Pool(stats.full_capacity, stats.full_num_used, stats.full_evictable_size, 0)
        return EngineState(config=config, num_layers=num_layers, pools={FULL: full})
    bytes_of = runner.kv_cache_configurator.split_input()
    split = runner.kv_cache_configurator.split
    rows = config.sink_tokens
    lazy_bytes = bytes_of.streaming_bytes
    requests = scheduler.tree_cache.finished_requests
    layer_requests = dict.fromkeys(config.lazy_layers, requests)
    dynamic = runner.dynamic
    layer_sets = None if dynamic is None else dynamic.sets
    laziness: list[float] = []
    scored = 0
    if layer_sets is not None:
        layer_requests = {layer: int(count) for layer, count in enumerate(layer_sets.finished.read())}
        *laziness, count = layer_sets.scored.read()
        scored = int(count)
    return EngineState(
        config=config,
        num_layers=num_layers,
        pools={
            FULL: Pool(
                stats.full_capacity, stats.full_num_used, stats.full_evictable_size, bytes_of.full_bytes
            ),
            STREAMING: Pool(stats.swa_capacity, stats.swa_num_used, stats.swa_evictable_size, lazy_bytes),
            SINK: Pool(
                sinks.capacity * rows, sinks.in_use * rows, (sinks.used - sinks.in_use) * rows, lazy_bytes
            ),
        },
        extra_token_bytes=lazy_bytes,
        expected_tokens=split.expected_tokens,
        expected_requests=split.requests,
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
