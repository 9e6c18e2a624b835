"""What a load test sends and what it demands: a YAML file as frozen dataclasses.

A file describes one scenario, or several that differ in a few values: each entry of ``cases`` is a mapping
that is laid over the file's own, and its ``name`` is appended. All lengths are tokens, all rates a second.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lt_sglang.errors import LightTransferError
from lt_sglang.loadtest.fields import Fields

APIS = ("generate", "completions", "chat")
LOADS = ("closed", "poisson", "trace")
LENGTHS = ("fixed", "uniform", "lognormal")
TRACES = ("mooncake", "azure")
ABORTS = ("disconnect", "abort_request")
SIDES = ("both", "lighttransfer")


@dataclass(frozen=True)
class Length:
    """A distribution of lengths: every value lies in ``low`` to ``high``.

    kind: fixed (low = high), uniform, or lognormal with ``median`` and ``sigma`` of the logarithm, clipped.
    """

    kind: str
    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0


@dataclass(frozen=True)
class Shared:
    """Prompts begin with one of ``prefixes`` texts of ``tokens`` each, chosen at random."""

    prefixes: int
    tokens: int


@dataclass(frozen=True)
class Trace:
    """Lengths, shared prefixes and arrival times of a public trace.

    path: the trace's file, in a scenario file relative to it; where there is none, a generator fitted to the
    trace takes its place.
    length_scale: factor on all lengths, for small models. longest, longest_output: prompts and outputs are
    cut to so many tokens, after the factor. speed: factor on the rate of arrivals.
    """

    source: str
    path: str
    length_scale: float = 1.0
    longest: int = 131072
    longest_output: int = 4096
    speed: float = 1.0


@dataclass(frozen=True)
class Traffic:
    """One kind of request.

    weight: its share among the kinds of a scenario. turns: requests of one conversation, each of which
    repeats what came before and adds ``input`` tokens. think_seconds: between two turns.
    """

    name: str
    weight: float = 1.0
    input: Length | None = None
    output: Length | None = None
    shared: Shared | None = None
    turns: int = 1
    think_seconds: float = 0.0
    trace: Trace | None = None


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    kind: closed (``users`` that each send the next request when the last is answered), poisson (``rate``
    conversations a second, whatever is answered) or trace (at the trace's own times). It ends after
    ``requests`` conversations or ``seconds``, whichever comes first; what was sent is waited for. warmup:
    requests before it, not measured. period: after so many conversations lengths, kinds and aborts repeat,
    with other text, so that parts of a long run can be compared. timeout_seconds: without a byte from the
    server for so long, a request is an error.
    """

    kind: str
    users: int = 1
    rate: float = 0.0
    requests: int | None = None
    seconds: float | None = None
    warmup: int = 2
    period: int | None = None
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class Aborts:
    """A ``share`` of the requests is given up after ``after_tokens`` streamed tokens.

    how: the connection is closed (disconnect), or /abort_request is called for it as well (abort_request).
    """

    share: float = 0.0
    after_tokens: int = 8
    how: str = "disconnect"


@dataclass(frozen=True)
class Slo:
    """Limits in milliseconds a request must meet to count as good; None: no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


@dataclass(frozen=True)
class Gate:
    """A figure of the summary must lie in ``min`` to ``max``; None: no limit."""

    metric: str
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True)
class Engine:
    """What ``lt-sglang bench`` starts.

    shape: a known shape with dummy weights; None needs --model-path. tp: GPUs. sides: both, or only ours.
    lighttransfer: the configuration of ours (keys as in ``--lt-config``). flags: SGLang's, for both.
    baseline_flags, lighttransfer_flags: for one side only; ``{tp}`` in the former is the number of GPUs.
    """

    shape: str | None = None
    tp: int = 1
    sides: str = "both"
    lighttransfer: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    baseline_flags: tuple[str, ...] = ()
    lighttransfer_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """One load test.

    api: generate (SGLang's own, token ids), completions or chat (OpenAI). about: one line for reports.
    """

    name: str
    about: str
    api: str
    load: Load
    traffic: tuple[Traffic, ...]
    seed: int = 0
    aborts: Aborts = Aborts()
    slo: Slo = Slo()
    gates: tuple[Gate, ...] = ()
    engine: Engine = Engine()


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
    found = [one for one in scenarios if name in (None, one.name) or one.name.endswith(f"-{name}")]
    if len(found) != 1:
        names = ", ".join(one.name for one in scenarios)
        raise LightTransferError(f"--case {name or 'missing'}: must be one of {names}")
    return found[0]


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
    )
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
    from lt_sglang.loadtest.samples import METRICS

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
    from lt_sglang.loadtest.shapes import SHAPES

    shape = fields.raw("shape")
    return Engine(
        shape=None if shape is None else fields.text("shape", None, tuple(SHAPES)),
        tp=fields.integer("tp", 1, 1),
        sides=fields.text("sides", "both", SIDES),
        lighttransfer=fields.mapping("lighttransfer"),
        flags=fields.texts("flags"),
        baseline_flags=fields.texts("baseline_flags"),
        lighttransfer_flags=fields.texts("lighttransfer_flags"),
    )
