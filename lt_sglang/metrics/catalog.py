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
KV_SLOTS = Metric(
    "lt_kv_slots",
    Kind.GAUGE,
    Scope.RANK,
    ("kind", "state"),
    "Token slots by kind (full: in full layers, streaming: of windows in lazy layers, sink: of sink sets) "
    "and state: used by running requests, or cached and free to be evicted.",
)
KV_BYTES = Metric(
    "lt_kv_bytes",
    Kind.GAUGE,
    Scope.RANK,
    ("kind", "state"),
    "KV bytes of the same slots on this GPU.",
)
KV_CAPACITY = Metric(
    "lt_kv_capacity_bytes",
    Kind.GAUGE,
    Scope.RANK,
    (),
    "KV bytes of this GPU; all kinds share them.",
)
KV_FREE = Metric(
    "lt_kv_free_bytes",
    Kind.GAUGE,
    Scope.RANK,
    (),
    "Of them, those that hold nothing.",
)
HOST_BYTES = Metric(
    "lt_host_kv_bytes",
    Kind.GAUGE,
    Scope.RANK,
    ("kind",),
    "With HiCache: bytes of this GPU's host memory that hold KV, by kind of slots, or are free.",
)
RETRACTIONS = Metric(
    "lt_retractions_total",
    Kind.COUNTER,
    Scope.ENGINE,
    ("cause",),
    "Requests that gave their KV back and wait again, by cause: memory (decoding ran out of it), limit (of "
    "--max-total-tokens) or other (a more urgent request, a pause).",
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
    "Asked for a sink set and got a new one (captured), another request's (shared) or none (refused: no slot "
    "was free; the request stays out of the prefix cache meanwhile). evicted: stored sets given up. "
    "restored: sets that came back from host memory (HiCache).",
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
    KV_SLOTS,
    KV_BYTES,
    KV_CAPACITY,
    KV_FREE,
    KV_SAVED,
    HOST_BYTES,
    RETRACTIONS,
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
