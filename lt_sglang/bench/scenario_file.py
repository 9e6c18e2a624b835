"""Scenario files: YAML to dataclasses and back.

A file describes one scenario, or several that differ in a few values: each entry of ``cases`` is a mapping
that is laid over the file's own, and its ``name`` is appended.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lt_sglang.bench.fields import Fields
from lt_sglang.bench.samples import METRICS
from lt_sglang.bench.scenario import (
    ABORTS,
    APIS,
    LENGTHS,
    LOADS,
    SIDES,
    TRACES,
    Aborts,
    Engine,
    Gate,
    Length,
    Load,
    Scenario,
    Shared,
    Slo,
    Trace,
    Traffic,
)
from lt_sglang.errors import LightTransferError
from lt_sglang.planner.shapes import CONFIGS


def load_scenarios(path: Path) -> tuple[Scenario, ...]:
    """The scenarios of a file, in its order; raises LightTransferError that names the file and the field."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LightTransferError(f"{path}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise LightTransferError(f"{path}: must be a mapping")
    cases = data.pop("cases", None)
    try:
        if cases is None:
            return (_scenario(data, path.parent),)
        if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases) or not cases:
            raise LightTransferError("cases: must be a list of mappings")
        return tuple(_scenario(_case(data, case), path.parent) for case in cases)
    except LightTransferError as error:
        raise LightTransferError(f"{path}: {error}") from None


def pick(scenarios: tuple[Scenario, ...], name: str | None) -> Scenario:
    """The scenario ``name``, given whole or without the file's own part; the only one if name is None."""
    found = [one for one in scenarios if name is None or _is_case(one, name)]
    if len(found) != 1:
        names = ", ".join(one.name for one in scenarios)
        given = f"--case {name}: must be" if name is not None else "--case: missing; give"
        raise LightTransferError(f"{given} one of {names}")
    return found[0]


def pick_cases(files: Sequence[tuple[Scenario, ...]], names: Sequence[str]) -> list[tuple[Scenario, ...]]:
    """Of each file the scenarios that one of ``names`` picks, as in `pick`; all of them without names.

    Raises LightTransferError if a name picks nothing, or two of one file.
    """
    if not names:
        return list(files)
    everything = tuple(one for scenarios in files for one in scenarios)
    picked: list[tuple[Scenario, ...]] = [() for _ in files]
    for name in names:
        having = [i for i, scenarios in enumerate(files) if any(_is_case(one, name) for one in scenarios)]
        if not having:
            pick(everything, name)
        for i in having:
            picked[i] += (pick(files[i], name),)
    return [scenarios for scenarios in picked if scenarios]


def _is_case(scenario: Scenario, name: str) -> bool:
    return name == scenario.name or scenario.name.endswith(f"-{name}")


def as_mapping(scenario: Scenario) -> dict[str, Any]:
    """What a file would hold to describe ``scenario``."""
    data: dict[str, Any] = _plain(asdict(scenario))
    for kind, traffic in zip(data["traffic"], scenario.traffic, strict=True):
        for name in ("input", "output"):
            length: Length | None = getattr(traffic, name)
            if length is not None:
                kind[name] = _length_mapping(length)
        if traffic.trace is not None:
            del kind["turns"], kind["think_seconds"]
    data["gates"] = {gate.pop("metric"): gate for gate in data["gates"]}
    return data


def _length_mapping(length: Length) -> Any:
    if length.kind == "fixed":
        return length.low
    names = ("low", "high") if length.kind == "uniform" else ("low", "high", "median", "sigma")
    return {length.kind: {name: getattr(length, name) for name in names}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _case(base: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = _laid_over(copy.deepcopy(base), case)
    merged["name"] = f"{base.get('name', '')}-{case.get('name', '')}"
    return merged


def _laid_over(base: Any, top: Any) -> Any:
    if isinstance(base, dict) and isinstance(top, dict):
        return {**base, **{key: _laid_over(base.get(key), value) for key, value in top.items()}}
    return top


def _scenario(data: dict[str, Any], folder: Path) -> Scenario:
    fields = Fields(data, "", Scenario)
    api = fields.text("api", "generate", APIS)
    engine = _engine(Fields(fields.mapping("engine"), "engine", Engine))
    if engine.shape is not None and api != "generate":
        raise LightTransferError(f"api: {api!r} needs a tokenizer, which engine.shape has not; use generate")
    load = _load(Fields(fields.raw("load"), "load", Load))
    traffic = fields.raw("traffic")
    if isinstance(traffic, dict):
        traffic = [{"name": "all", **traffic}]
    if not isinstance(traffic, list) or not traffic:
        raise LightTransferError("traffic: must be a mapping, or a list of them")
    kinds = tuple(_traffic(one, f"traffic[{index}]", api, folder) for index, one in enumerate(traffic))
    if load.kind == "trace" and (len(kinds) != 1 or kinds[0].trace is None):
        raise LightTransferError("load.kind: trace needs traffic of one kind with a trace")
    if load.fill and any(kind.input is None or kind.shared is not None or kind.turns > 1 for kind in kinds):
        raise LightTransferError("load.fill: needs prompts of known lengths that share nothing")
    return Scenario(
        name=fields.text("name"),
        about=fields.text("about"),
        api=api,
        load=load,
        traffic=kinds,
        seed=fields.integer("seed", 0, 0),
        aborts=_aborts(Fields(fields.mapping("aborts"), "aborts", Aborts)),
        slo=_slo(Fields(fields.mapping("slo"), "slo", Slo)),
        gates=tuple(_gate(name, limits) for name, limits in fields.mapping("gates").items()),
        engine=engine,
    )


def _load(fields: Fields) -> Load:
    kind = fields.text("kind", None, LOADS)
    load = Load(
        kind=kind,
        users=fields.integer("users", 1) if kind == "closed" else 1,
        rate=fields.number("rate", 1e-6) if kind == "poisson" else 0.0,
        requests=fields.maybe_integer("requests", 1),
        seconds=fields.maybe_number("seconds", 0.1),
        warmup=fields.integer("warmup", 0, 2),
        period=fields.maybe_integer("period", 1),
        timeout_seconds=fields.number("timeout_seconds", 0.1, default=600.0),
        fill=fields.boolean("fill", False),
    )
    if load.fill and kind != "closed":
        raise LightTransferError("load.fill: only with kind closed, where users wait for their answers")
    if load.requests is None and load.seconds is None:
        raise LightTransferError("load: one of requests and seconds must be given")
    return load


def _traffic(data: Any, where: str, api: str, folder: Path) -> Traffic:
    fields = Fields(data, where, Traffic)
    trace = fields.raw("trace")
    name, weight = fields.text("name"), fields.number("weight", 0.0, default=1.0)
    if trace is not None:
        if fields.raw("input") is not None or fields.raw("output") is not None:
            raise LightTransferError(
                f"{fields.name('trace')}: has its own lengths; leave input and output out"
            )
        return Traffic(name, weight, trace=_trace(Fields(trace, fields.name("trace"), Trace), folder))
    shared = fields.raw("shared")
    turns = fields.integer("turns", 1, 1)
    if turns > 1 and api == "completions":
        raise LightTransferError(f"{fields.name('turns')}: only 1 with api completions; use generate or chat")
    return Traffic(
        name,
        weight,
        input=_length(fields.raw("input"), fields.name("input")),
        output=_length(fields.raw("output"), fields.name("output")),
        shared=None if shared is None else _shared(Fields(shared, fields.name("shared"), Shared)),
        turns=turns,
        think_seconds=fields.number("think_seconds", 0.0, default=0.0),
    )


def _length(data: Any, where: str) -> Length:
    """A number, or ``{uniform: {low, high}}``, or ``{lognormal: {median, sigma, low, high}}``."""
    if type(data) is int and data >= 1:
        return Length("fixed", data, data)
    kind, values = next(iter(data.items())) if isinstance(data, Mapping) and len(data) == 1 else (None, None)
    if kind not in LENGTHS[1:]:
        raise LightTransferError(
            f"{where}: {data!r} is not a number of tokens from 1, {{uniform: {{low, high}}}} "
            "or {lognormal: {median, sigma, low, high}}"
        )
    fields = Fields(values, f"{where}.{kind}", Length)
    low = fields.integer("low", 1)
    high = fields.integer("high", low)
    if kind == "uniform":
        return Length(kind, low, high)
    return Length(kind, low, high, fields.number("median", low, high), fields.number("sigma", 0.0))


def _shared(fields: Fields) -> Shared:
    return Shared(prefixes=fields.integer("prefixes", 1), tokens=fields.integer("tokens", 1))


def _trace(fields: Fields, folder: Path) -> Trace:
    return Trace(
        source=fields.text("source", None, TRACES),
        path=str((folder / fields.text("path")).resolve()),
        length_scale=fields.number("length_scale", 1e-4, default=1.0),
        longest=fields.integer("longest", 1, 131072),
        longest_output=fields.integer("longest_output", 1, 4096),
        speed=fields.number("speed", 1e-4, default=1.0),
    )


def _aborts(fields: Fields) -> Aborts:
    return Aborts(
        share=fields.number("share", 0.0, 1.0, 0.0),
        after_tokens=fields.integer("after_tokens", 1, 8),
        how=fields.text("how", "disconnect", ABORTS),
    )


def _slo(fields: Fields) -> Slo:
    return Slo(*(fields.maybe_number(name, 0.0) for name in ("ttft_ms", "tpot_ms", "e2e_ms")))


def _gate(name: str, limits: Any) -> Gate:
    if name not in METRICS:
        raise LightTransferError(f"gates.{name}: unknown, allowed are {', '.join(METRICS)}")
    fields = Fields(
        {"metric": name, **(limits if isinstance(limits, Mapping) else {})}, f"gates.{name}", Gate
    )
    gate = Gate(name, fields.maybe_number("min", 0.0), fields.maybe_number("max", 0.0))
    if gate.min is None and gate.max is None:
        raise LightTransferError(f"gates.{name}: min, max or both must be given")
    return gate


def _engine(fields: Fields) -> Engine:
    shape, baseline = (
        None if fields.raw(key) is None else fields.text(key, None, tuple(CONFIGS))
        for key in ("shape", "baseline_shape")
    )
    return Engine(
        shape=shape,
        baseline_shape=baseline,
        tp=fields.integer("tp", 1, 1),
        sides=fields.text("sides", "both", SIDES),
        lighttransfer=fields.mapping("lighttransfer"),
        flags=fields.texts("flags"),
        baseline_flags=fields.texts("baseline_flags"),
        lighttransfer_flags=fields.texts("lighttransfer_flags"),
    )
