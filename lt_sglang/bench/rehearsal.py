"""A scenario made small enough for a CPU, to try its file before GPUs are rented for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lt_sglang.bench.scenario import Engine, Length, Load, Phase, Scenario, Traffic
from lt_sglang.config import LIST, format_layers
from lt_sglang.planner.shapes import CONFIGS

SHAPE = "tiny"
# 128K prompts become 2K.
FACTOR = 1 / 64
LONGEST = 4000
REQUESTS = 6
RANKS = 2
SECONDS = 20.0
PHASE_SECONDS = 4.0
SINK, RECENT = 4, 60
FLAGS = (
    *("--max-total-tokens", "16000", "--max-running-requests", "8"),
    *("--chunked-prefill-size", "256", "--mem-fraction-static", "0.3"),
)


def rehearsal(scenario: Scenario, most_tp: int = RANKS) -> Scenario:
    """The same scenario with a tiny model, 1/64 of the lengths, 6 requests and at most ``most_tp`` ranks.

    Flags of the scenario's own are left out, but for those of one side only; gates are, too.
    """
    return replace(
        scenario,
        api="generate",
        load=_load(scenario.load),
        traffic=tuple(_traffic(kind) for kind in scenario.traffic),
        gates=(),
        engine=_engine(scenario.engine, most_tp),
    )


def _load(load: Load) -> Load:
    if load.phases:
        phases = tuple(Phase(PHASE_SECONDS, min(one.users, REQUESTS)) for one in load.phases)
        return replace(load, phases=phases, warmup=min(load.warmup, 1))
    return replace(
        load,
        users=min(load.users, REQUESTS),
        requests=min(load.requests or REQUESTS, REQUESTS),
        seconds=min(load.seconds or SECONDS, SECONDS),
        rate=min(load.rate, 2.0),
        warmup=min(load.warmup, 1),
    )


def _traffic(kind: Traffic) -> Traffic:
    return replace(
        kind,
        input=_length(kind.input),
        output=_length(kind.output),
        shared=kind.shared and replace(kind.shared, tokens=_scaled(kind.shared.tokens)),
        think_seconds=min(kind.think_seconds, 0.1),
        trace=kind.trace and replace(kind.trace, length_scale=FACTOR, longest=LONGEST, longest_output=64),
    )


def _length(length: Length | None) -> Length | None:
    if length is None:
        return None
    low, high = _scaled(length.low), _scaled(length.high)
    median = min(max(length.median * FACTOR, low), high) if length.kind == "lognormal" else 0.0
    return replace(length, low=low, high=high, median=median)


def _scaled(tokens: int) -> int:
    return max(1, min(LONGEST, round(tokens * FACTOR)))


def _engine(engine: Engine, most_tp: int) -> Engine:
    given = dict(engine.lighttransfer)
    kept = ("mode", "score", "decide", "last_queries", "check_tables")
    own: dict[str, Any] = {name: given[name] for name in kept if name in given}
    return replace(
        engine,
        shape=SHAPE,
        baseline_shape=None,
        tp=min(engine.tp, most_tp),
        lighttransfer={**own, **_layers(given), "sink_tokens": SINK, "recent_tokens": RECENT},
        flags=FLAGS,
    )


def _layers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Half of the tiny model's layers lazy, or as many found in dynamic mode."""
    layers = CONFIGS[SHAPE]["num_hidden_layers"]
    if given.get("mode") == "dynamic" and given.get("score") != LIST:
        return {"keep": layers // 2}
    return {"lazy_layers": format_layers(range(layers // 4, 3 * layers // 4))}
