"""Requests of several lengths, and how many of them run at once, by the arithmetic of the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from lt_sglang.memory.demand import Demand


@dataclass(frozen=True)
class Part:
    """Requests of one length; share: of all that are sent, above 0."""

    input_tokens: int
    output_tokens: int
    share: float = 1.0

    @property
    def tokens(self) -> int:
        """Of a request."""
        return self.input_tokens + self.output_tokens


Mix = Sequence[Part]


def running(mix: Mix) -> list[float]:
    """The share of each part among the running requests: who outputs twice as much is there twice as long."""
    steps = [part.share * part.output_tokens for part in mix]
    return [each / sum(steps) for each in steps]


def requests_at_once(demand: Demand, units: int, mix: Mix, full_limit: int | None = None) -> int:
    """Requests of ``mix`` that run at once in ``units``, so that none has to be retracted.

    full_limit: most tokens in full layers, if there is such a limit.

    All but one have had their prefill: they hold their tokens, and reckon with all of their output. The one
    more is what admission asks about, with its chunk, and before it is decided with all layers of its prompt.
    """
    left = units - max(demand.of_new(part.input_tokens, part.output_tokens) for part in mix)
    if left < 0:
        return 0
    shares = list(zip(running(mix), mix, strict=True))
    each = sum(w * demand.of_decoding(part.input_tokens, part.output_tokens) for w, part in shares)
    requests = 1 + floor(left / each)
    if full_limit is None:
        return requests
    return min(requests, floor(full_limit / sum(w * part.tokens for w, part in shares)))
