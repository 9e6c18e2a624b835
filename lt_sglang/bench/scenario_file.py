"""Scenario files: YAML to dataclasses and back.

A file describes one scenario, or several that differ in a few values: each entry of ``cases`` is a mapping
that is laid over the file's own, and its ``name`` is appended.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from lt_sglang.bench.samples import METRICS
from lt_sglang.bench.scenario import Length, Scenario, Traffic
from lt_sglang.errors import LightTransferError

READER = TypeAdapter(Scenario)
SCHEMA = READER.json_schema()
KINDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "array": "a list",
    "object": "a mapping",
}


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
    """The scenario ``name``, given whole or without the file's own part; the only one if name is None.

    The end of a name will do where no name is ``name``.
    """
    found = list(scenarios) if name is None else _named(scenarios, name) or _ending(scenarios, name)
    if len(found) != 1:
        names = ", ".join(one.name for one in scenarios)
        given = f"--case {name}: must be" if name is not None else "--case: missing; give"
        raise LightTransferError(f"{given} one of {names}")
    return found[0]


def pick_cases(files: Sequence[tuple[Scenario, ...]], names: Sequence[str]) -> list[tuple[Scenario, ...]]:
    """Of each file the scenarios that one of ``names`` picks, as in `pick`; all of them without names.

    Raises:
        LightTransferError: a name picks nothing, or two of one file.
    """
    if not names:
        return list(files)
    everything = tuple(one for scenarios in files for one in scenarios)
    picked: list[tuple[Scenario, ...]] = [() for _ in files]
    for name in names:
        # 8k-static is not 2k-8k-static, in whichever file that is.
        found = _named if any(_named(scenarios, name) for scenarios in files) else _ending
        having = [i for i, scenarios in enumerate(files) if found(scenarios, name)]
        if not having:
            pick(everything, name)
        for i in having:
            picked[i] += (pick(files[i], name),)
    return [scenarios for scenarios in picked if scenarios]


def _named(scenarios: Sequence[Scenario], name: str) -> list[Scenario]:
    """Those called ``name``, whole or without what all names of the file begin with."""
    letters = zip(*(one.name for one in scenarios), strict=False)
    begin = "".join(letter[0] for letter in takewhile(lambda letter: len(set(letter)) == 1, letters))
    own = begin.rfind("-") + 1
    return [one for one in scenarios if name in (one.name, one.name[own:])]


def _ending(scenarios: Sequence[Scenario], name: str) -> list[Scenario]:
    return [one for one in scenarios if one.name.endswith(f"-{name}")]


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
    if scenario.load.phases:
        del data["load"]["users"]
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
    """Check one scenario's values; raises LightTransferError that names the field and what it allows."""
    traffic, gates = data.get("traffic"), data.get("gates") or {}
    if isinstance(traffic, dict):
        data = {**data, "traffic": [{"name": "all", **traffic}]}
    elif not isinstance(traffic, list) or not traffic:
        raise LightTransferError("traffic: must be a mapping, or a list of them")
    if isinstance(gates, dict):
        data = {**data, "gates": [_gate(name, limits) for name, limits in gates.items()]}
    try:
        # As JSON, in which a list may become a tuple though nothing else is converted.
        scenario = READER.validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise LightTransferError(_told(error.errors()[0])) from None
    _check(scenario, data["load"])
    return replace(scenario, traffic=tuple(_located(kind, folder) for kind in scenario.traffic))


def _gate(name: str, limits: Any) -> dict[str, Any]:
    if name not in METRICS:
        raise LightTransferError(f"gates.{name}: unknown, allowed are {', '.join(METRICS)}")
    limits = limits if isinstance(limits, dict) else {}
    if all(limits.get(end) is None for end in ("min", "max")):
        raise LightTransferError(f"gates.{name}: min, max or both must be given")
    return {**limits, "metric": name}


def _told(error: Any) -> str:
    """One error of pydantic's: the field, the value, and what the schema allows there."""
    place = [part for part in error["loc"] if not isinstance(part, str) or not part.startswith("function-")]
    given, unknown = error["input"], error["type"] == "unexpected_keyword_argument"
    if error["type"] == "missing":
        given = None
    schema = SCHEMA
    name = ""
    for part in place[:-1] if unknown else place:
        schema = _resolved(schema.get("properties", {}).get(part) or schema.get("items", {}))
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    if unknown:
        name = f"{name}.{place[-1]}" if name else str(place[-1])
        return f"{name}: unknown, allowed are {', '.join(schema['properties'])}"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    return f"{name}: {given!r} is not {_allowed(schema)}"


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """Without a reference, and without the other choice of a value that may be left out."""
    for choice in schema.get("anyOf", ()):
        if choice.get("type") != "null":
            schema = choice
    reference = schema.get("$ref")
    return SCHEMA["$defs"][reference.rpartition("/")[2]] if reference else schema


def _allowed(schema: dict[str, Any]) -> str:
    """What values a schema allows, in words."""
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "properties" in schema:
        return f"a mapping with {', '.join(schema['properties'])}"
    low, high = schema.get("minimum"), schema.get("maximum")
    span = (f" from {low:g}" if low is not None else "") + (f" to {high:g}" if high is not None else "")
    return KINDS[schema["type"]] + span


def _check(scenario: Scenario, load: dict[str, Any]) -> None:
    """Raise LightTransferError for values that do not go together; ``load``: as given."""
    kinds = scenario.traffic
    if scenario.engine.shape is not None and scenario.api != "generate":
        raise LightTransferError(
            f"api: {scenario.api!r} needs a tokenizer, which engine.shape has not; use generate"
        )
    if scenario.load.phases:
        _check_phases(scenario, load)
    elif scenario.load.kind == "closed" and "users" not in load:
        raise LightTransferError("load.users: None is not an integer from 1")
    if scenario.load.kind == "poisson" and not scenario.load.rate:
        raise LightTransferError(f"load.rate: {scenario.load.rate} is not a number above 0")
    if scenario.load.requests is None and scenario.load.length is None:
        raise LightTransferError("load: one of requests and seconds must be given")
    if scenario.load.kind == "trace" and (len(kinds) != 1 or kinds[0].trace is None):
        raise LightTransferError("load.kind: trace needs traffic of one kind with a trace")
    if scenario.load.fill and scenario.load.kind != "closed":
        raise LightTransferError("load.fill: only with kind closed, where users wait for their answers")
    if scenario.load.fill and any(one.input is None or one.shared or one.turns > 1 for one in kinds):
        raise LightTransferError("load.fill: needs prompts of known lengths that share nothing")
    for number, kind in enumerate(kinds):
        _check_traffic(kind, f"traffic[{number}]", scenario.api)


def _check_phases(scenario: Scenario, load: dict[str, Any]) -> None:
    """Raise LightTransferError unless each phase has its kind of traffic, and all else follows from them."""
    phases, kinds = scenario.load.phases, scenario.traffic
    if scenario.load.kind != "closed":
        raise LightTransferError("load.phases: only with kind closed")
    if extra := sorted({"users", "seconds", "requests", "fill"} & {k for k, v in load.items() if v}):
        raise LightTransferError(f"load.{extra[0]}: not with phases, which say how many and how long")
    if len(phases) != len(kinds) or len({kind.name for kind in kinds}) != len(kinds):
        raise LightTransferError(
            f"load.phases: {len(phases)} phases need as many kinds of traffic, each with a name of its own"
        )


def _check_traffic(kind: Traffic, where: str, api: str) -> None:
    if kind.trace is not None:
        if kind.input is not None or kind.output is not None:
            raise LightTransferError(f"{where}.trace: has its own lengths; leave input and output out")
        return
    if kind.turns > 1 and api == "completions":
        raise LightTransferError(f"{where}.turns: only 1 with api completions; use generate or chat")
    for name, length in (("input", kind.input), ("output", kind.output)):
        if length is None:
            raise LightTransferError(f"{where}.{name}: missing; a number of tokens from 1")
        name = f"{where}.{name}.{length.kind}"
        if length.high < length.low:
            raise LightTransferError(f"{name}.high: {length.high} is not an integer from {length.low}")
        if length.kind == "lognormal" and not length.low <= length.median <= length.high:
            span = f"from {length.low} to {length.high}"
            raise LightTransferError(f"{name}.median: {length.median} is not a number {span}")


def _located(kind: Traffic, folder: Path) -> Traffic:
    """With the trace's path relative to the scenario's folder."""
    if kind.trace is None:
        return kind
    return replace(kind, trace=replace(kind.trace, path=str((folder / kind.trace.path).resolve())))
