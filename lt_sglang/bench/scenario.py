"""What a load test sends and what it demands. All lengths are tokens, all rates a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from lt_sglang.planner.shapes import CONFIGS

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# What is divided by.
Positive = Annotated[float, Field(ge=1e-4, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0.1, allow_inf_nan=False)]
# Command lines; numbers in them may be written as numbers.
Flags = tuple[Annotated[str, BeforeValidator(str)], ...]
if TYPE_CHECKING:
    Shape = str
else:
    Shape = Literal[tuple(CONFIGS)]


class Checked:
    """Of what scenario_file.py reads with pydantic: unknown keys are refused."""

    __pydantic_config__ = ConfigDict(extra="forbid")


def read_length(data: Any) -> Any:
    """A number, or ``{uniform: {low, high}}``, or ``{lognormal: {median, sigma, low, high}}``, as fields."""
    if type(data) is int and data >= 1:
        return {"kind": "fixed", "low": data, "high": data}
    if isinstance(data, Mapping) and len(data) == 1:
        ((kind, values),) = data.items()
        if kind in ("uniform", "lognormal") and isinstance(values, Mapping):
            return {**values, "kind": kind}
    raise ValueError(
        f"{data!r} is not a number of tokens from 1, {{uniform: {{low, high}}}} or "
        "{lognormal: {median, sigma, low, high}}"
    )


@dataclass(frozen=True)
class Length(Checked):
    """A distribution of lengths: every value lies in ``low`` to ``high``.

    kind: fixed (low = high), uniform, or lognormal with ``median`` and ``sigma`` of the logarithm, clipped.
    """

    kind: Literal["fixed", "uniform", "lognormal"]
    low: Count
    high: Count
    median: Number = 0.0
    sigma: Number = 0.0


@dataclass(frozen=True)
class Shared(Checked):
    """Prompts begin with one of ``prefixes`` texts of ``tokens`` each, chosen at random."""

    prefixes: Count
    tokens: Count


@dataclass(frozen=True)
class Trace(Checked):
    """Lengths, shared prefixes and arrival times of a public trace.

    path: the trace's file, in a scenario file relative to it; where there is none, a generator fitted to the
    trace takes its place.
    length_scale: factor on all lengths, for small models. longest, longest_output: prompts and outputs are
    cut to so many tokens, after the factor. speed: factor on the rate of arrivals.
    """

    source: Literal["mooncake", "azure"]
    path: Text
    length_scale: Positive = 1.0
    longest: Count = 131072
    longest_output: Count = 4096
    speed: Positive = 1.0


@dataclass(frozen=True)
class Traffic(Checked):
    """One kind of request.

    weight: its share among the kinds of a scenario. turns: requests of one conversation, each of which
    repeats what came before and adds ``input`` tokens. think_seconds: between two turns.
    """

    name: Text
    weight: Number = 1.0
    input: Annotated[Length, BeforeValidator(read_length)] | None = None
    output: Annotated[Length, BeforeValidator(read_length)] | None = None
    shared: Shared | None = None
    turns: Count = 1
    think_seconds: Number = 0.0
    trace: Trace | None = None


@dataclass(frozen=True)
class Phase(Checked):
    """A stretch of a run in which ``users`` send requests of one kind."""

    seconds: Seconds
    users: Count


@dataclass(frozen=True)
class Load(Checked):
    """How requests arrive.

    kind: closed (``users`` that each send the next request when the last is answered), poisson (``rate``
    conversations a second, whatever is answered) or trace (at the trace's own times). It ends after
    ``requests`` conversations or ``seconds``, whichever comes first; what was sent is waited for. warmup:
    requests before it, of few tokens of output, not measured. period: after so many conversations lengths,
    kinds and aborts repeat, with other text, so that parts of a long run can be compared. timeout_seconds:
    without a byte from the server for so long, a request is an error. fill: of users and requests no more
    than the server's KV memory holds at once, so that memory is filled once and nothing is prefilled that
    measures nothing. phases: with kind closed, in place of users and seconds: one after the other, each with
    the traffic of its number; who still waits for an answer as one ends is waited for in the next.
    """

    kind: Literal["closed", "poisson", "trace"]
    users: Count = 1
    rate: Number = 0.0
    requests: Count | None = None
    seconds: Seconds | None = None
    warmup: Annotated[int, Field(ge=0)] = 2
    period: Count | None = None
    timeout_seconds: Seconds = 600.0
    fill: bool = False
    phases: tuple[Phase, ...] = ()

    @property
    def length(self) -> float | None:
        """Seconds in which requests are sent; None: until all are."""
        return sum(phase.seconds for phase in self.phases) or self.seconds

    @property
    def most_users(self) -> int:
        """Users there are, in all phases together: those of one may still wait as the next begins."""
        return sum(phase.users for phase in self.phases) or self.users

    def phase_at(self, seconds: float) -> int | None:
        """The number of the phase so long after the beginning; None without phases, and behind the last."""
        for number, phase in enumerate(self.phases):
            if seconds < phase.seconds:
                return number
            seconds -= phase.seconds
        return None


@dataclass(frozen=True)
class Aborts(Checked):
    """A ``share`` of the requests is given up after ``after_tokens`` streamed tokens.

    how: the connection is closed (disconnect), or /abort_request is called for it as well (abort_request).
    """

    share: Share = 0.0
    after_tokens: Count = 8
    how: Literal["disconnect", "abort_request"] = "disconnect"


@dataclass(frozen=True)
class Slo(Checked):
    """Limits in milliseconds a request must meet to count as good; None: no limit."""

    ttft_ms: Number | None = None
    tpot_ms: Number | None = None
    e2e_ms: Number | None = None


@dataclass(frozen=True)
class Gate(Checked):
    """A figure of the summary must lie in ``min`` to ``max``; None: no limit."""

    metric: Text
    min: Number | None = None
    max: Number | None = None


@dataclass(frozen=True)
class Engine(Checked):
    """What ``lt-sglang bench`` starts.

    shape: a known shape with dummy weights; None needs --model-path. baseline_shape: stock's, where it needs
    the same sizes in another model's code. tp: GPUs. sides: both, or only ours.
    lighttransfer: the configuration of ours (keys as in ``--lt-config``). flags: SGLang's, for both.
    baseline_flags, lighttransfer_flags: for one side only, after those of the command line; ``{tp}`` in the
    former is the number of GPUs.
    """

    shape: Shape | None = None
    baseline_shape: Shape | None = None
    tp: Count = 1
    sides: Literal["both", "lighttransfer"] = "both"
    lighttransfer: Mapping[str, Any] = field(default_factory=dict)
    flags: Flags = ()
    baseline_flags: Flags = ()
    lighttransfer_flags: Flags = ()


@dataclass(frozen=True)
class Scenario(Checked):
    """One load test.

    api: generate (SGLang's own, token ids), completions or chat (OpenAI). about: one line for reports.
    """

    name: Text
    about: Text
    load: Load
    traffic: Annotated[tuple[Traffic, ...], Field(min_length=1)]
    api: Literal["generate", "completions", "chat"] = "generate"
    seed: Annotated[int, Field(ge=0)] = 0
    aborts: Aborts = Aborts()
    slo: Slo = Slo()
    gates: tuple[Gate, ...] = ()
    engine: Engine = Engine()
