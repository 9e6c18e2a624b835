"""What the scores need of a staged request's earlier chunks: its last queries, layer by layer.

A prompt's last chunk may be shorter than the number of queries that are scored. Their queries, outputs,
log-sum-exps and residuals are final once computed (attention is causal), so the last ones are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LastQueries:
    """The last queries of one request, or all queries of a batch, in one layer.

    query, attention: [W, heads, dim]. lse: float32 [W, heads], base 2. hidden: [W, hidden] or None.
    """

    query: torch.Tensor
    attention: torch.Tensor
    lse: torch.Tensor
    hidden: torch.Tensor | None

    def part(self, token: int, count: int) -> LastQueries:
        """``count`` of them from ``token`` on, as views."""
        some = slice(token, token + count)
        hidden = None if self.hidden is None else self.hidden[some]
        return LastQueries(self.query[some], self.attention[some], self.lse[some], hidden)

    def then(self, later: LastQueries) -> LastQueries:
        """These, followed by ``later`` ones."""
        hidden = None
        if self.hidden is not None and later.hidden is not None:
            hidden = torch.cat([self.hidden, later.hidden])
        return LastQueries(
            torch.cat([self.query, later.query]),
            torch.cat([self.attention, later.attention]),
            torch.cat([self.lse, later.lse]),
            hidden,
        )

    def last(self, count: int) -> LastQueries:
        """The last ``count`` of them, as views."""
        start = max(len(self.query) - count, 0)
        return self.part(start, len(self.query) - start)

    def copy(self) -> LastQueries:
        """A copy, which does not change when the batch's tensors are reused."""
        hidden = None if self.hidden is None else self.hidden.clone()
        return LastQueries(self.query.clone(), self.attention.clone(), self.lse.clone(), hidden)


class ObservationWindow:
    """The last queries of the one staged request, by layer. count: how many are kept."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._of_layer: dict[int, LastQueries] = {}

    def keep(self, layer: int, chunk: LastQueries, first: bool) -> None:
        """Remember the last queries of a staged chunk; ``first``: nothing before it counts."""
        chunk = chunk.last(self.count)
        if not first and len(chunk.query) < self.count:
            chunk = self._of_layer[layer].then(chunk).last(self.count)
        self._of_layer[layer] = chunk.copy()

    def join(self, layer: int, chunk: LastQueries, count: int) -> LastQueries:
        """The last ``count`` queries of earlier chunks and this one."""
        if len(chunk.query) >= count:
            return chunk.last(count)
        return self._of_layer[layer].then(chunk).last(count)

    def clear(self) -> None:
        """Free the memory: the request's layers are selected. After an abort the next one overwrites it."""
        self._of_layer.clear()
