"""What a load test sends and what it demands. All lengths are tokens, all rates a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    requests before it, of few tokens of output, not measured. period: after so many conversations lengths,
    kinds and aborts repeat, with other text, so that parts of a long run can be compared. timeout_seconds:
    without a byte from the server for so long, a request is an error. fill: of users and requests no more
    than the server's KV memory holds at once, so that memory is filled once and nothing is prefilled that
    measures nothing.
    """

    kind: str
    users: int = 1
    rate: float = 0.0
    requests: int | None = None
    seconds: float | None = None
    warmup: int = 2
    period: int | None = None
    timeout_seconds: float = 600.0
    fill: bool = False


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

    shape: a known shape with dummy weights; None needs --model-path. baseline_shape: stock's, where it needs
    the same sizes in another model's code. tp: GPUs. sides: both, or only ours.
    lighttransfer: the configuration of ours (keys as in ``--lt-config``). flags: SGLang's, for both.
    baseline_flags, lighttransfer_flags: for one side only, after those of the command line; ``{tp}`` in the
    former is the number of GPUs.
    """

    shape: str | None = None
    baseline_shape: str | None = None
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
