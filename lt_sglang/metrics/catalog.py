"""Every metric: name, type, labels, help. Dashboards and alerts rely on it, so a test freezes it.

Each metric also carries SGLang's own labels (model_name, engine_type, tp_rank, pp_rank, moe_ep_rank and those
of ``--extra-metric-labels``). *rank* metrics come from every GPU: sum bytes over tp_rank, take the maximum of
slots. *engine* metrics come from the first rank alone: they can be summed over everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Prometheus types in use."""

    GAUGE = "gauge"
    COUNTER = "counter"


class Scope(Enum):
    """Who publishes: every rank of the engine, or its first one."""

    RANK = "rank"
    ENGINE = "engine"


@dataclass(frozen=True)
class Metric:
    """One metric family; ``name`` as it stands in /metrics (counters end in ``_total``)."""

    name: str
    kind: Kind
    scope: Scope
    labels: tuple[str, ...]
    help: str


BUILD_INFO = Metric(
    "lt_build_info",
    Kind.GAUGE,
    Scope.ENGINE,
    ("version", "sglang_version"),
    "1; versions of lt-sglang and SGLang.",
)
CONFIG_INFO = Metric(
    "lt_config_info",
    Kind.GAUGE,
    Scope.ENGINE,
    ("mode", "lazy_layers", "sink_tokens", "recent_tokens"),
    "1; mode, lazy layers and windows in force.",
)
LAYERS = Metric(
    "lt_layers", Kind.GAUGE, Scope.ENGINE, ("kind",), "Attention layers of the model, by kind: full or lazy."
)
EXPECTED_TOKENS = Metric(
    "lt_expected_tokens",
    Kind.GAUGE,
    Scope.ENGINE,
    (),
    "Prompt and output tokens of the request that the pools are split for.",
)
EXPECTED_REQUESTS = Metric(
    "lt_expected_requests",
    Kind.GAUGE,
    Scope.ENGINE,
    (),
    "Requests of lt_expected_tokens that fit into the pools at once.",
)
POOL_CAPACITY = Metric(
    "lt_pool_capacity_slots",
    Kind.GAUGE,
    Scope.RANK,
    ("pool",),
    "Token slots of a pool: full, streaming or sink.",
)
POOL_SLOTS = Metric(
    "lt_pool_slots",
    Kind.GAUGE,
    Scope.RANK,
    ("pool", "state"),
    "Token slots of a pool that hold something: used by running requests, or cached and free to be evicted.",
)
KV_CAPACITY = Metric(
    "lt_kv_capacity_bytes", Kind.GAUGE, Scope.RANK, (), "KV bytes that all pools of this GPU hold when full."
)
KV_BYTES = Metric(
    "lt_kv_bytes",
    Kind.GAUGE,
    Scope.RANK,
    ("state",),
    "KV bytes that running requests use, or that are cached, on this GPU.",
)
KV_SAVED = Metric(
    "lt_kv_saved_bytes",
    Kind.GAUGE,
    Scope.RANK,
    ("state",),
    "KV bytes that the same tokens would hold in addition if every layer kept all of them.",
)
REQUESTS = Metric(
    "lt_requests_total",
    Kind.COUNTER,
    Scope.ENGINE,
    ("mode",),
    "Requests finished with lazy layers, by mode.",
)
LAYER_REQUESTS = Metric(
    "lt_layer_lazy_requests_total",
    Kind.COUNTER,
    Scope.ENGINE,
    ("layer",),
    "Requests finished in which the layer was lazy.",
)
SINK_REQUESTS = Metric(
    "lt_sink_requests", Kind.GAUGE, Scope.ENGINE, (), "Running requests whose sinks are in a sink set."
)
SINK_SETS = Metric(
    "lt_sink_sets_total",
    Kind.COUNTER,
    Scope.ENGINE,
    ("event",),
    "Asked for a sink set and got a new one (captured), another request's (shared) or none (refused: all in "
    "use; the request stays out of the prefix cache). evicted: stored sets given up for new ones.",
)
LAYER_SETS = Metric(
    "lt_layer_sets_total",
    Kind.COUNTER,
    Scope.ENGINE,
    ("event",),
    "Dynamic mode: requests whose lazy layers were found in their prefill (decided), taken over with a "
    "cached prefix (inherited), or the configured ones, the prompt being too short to tell (short). evicted: "
    "stored sets given up. resumed: retracted requests that computed their prompts again, with their old "
    "layers.",
)
IDENTIFICATION_SECONDS = Metric(
    "lt_identification_seconds_total",
    Kind.COUNTER,
    Scope.ENGINE,
    (),
    "Dynamic mode: seconds in which the first GPU scored layers and chose among them, waiting for the other "
    "ranks' scores included.",
)
TABLE_CHECKS = Metric(
    "lt_table_checks_total",
    Kind.COUNTER,
    Scope.ENGINE,
    ("result",),
    "Dynamic mode: prefills after which the ranks' layer tables were compared (check_tables), by result: "
    "same or different. The first different one stops the engine.",
)
SCORED_REQUESTS = Metric(
    "lt_scored_requests_total",
    Kind.COUNTER,
    Scope.ENGINE,
    (),
    "Dynamic mode: requests finished whose lazy layers had been found in a prompt, their own or that of the "
    "cached prefix they inherited.",
)
LAYER_LAZINESS = Metric(
    "lt_layer_laziness_sum",
    Kind.GAUGE,
    Scope.ENGINE,
    ("layer",),
    "Dynamic mode: sum of the layer's score (--lt-score; higher is lazier) over lt_scored_requests_total.",
)

CATALOG: tuple[Metric, ...] = (
    BUILD_INFO,
    CONFIG_INFO,
    LAYERS,
    EXPECTED_TOKENS,
    EXPECTED_REQUESTS,
    POOL_CAPACITY,
    POOL_SLOTS,
    KV_CAPACITY,
    KV_BYTES,
    KV_SAVED,
    REQUESTS,
    LAYER_REQUESTS,
    SINK_REQUESTS,
    SINK_SETS,
    LAYER_SETS,
    IDENTIFICATION_SECONDS,
    TABLE_CHECKS,
    SCORED_REQUESTS,
    LAYER_LAZINESS,
)
