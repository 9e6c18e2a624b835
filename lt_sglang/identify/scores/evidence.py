"""What a score may look at: the attention of one layer over the last queries of one prefill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


class Strided(NamedTuple):
    """[rows, heads, ...] for kernels: where it begins, and elements from one row or head to the next."""

    at: torch.Tensor
    row: int
    head: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Strided:
        """A tensor of two or more dimensions."""
        return cls(tensor, tensor.stride(0), tensor.stride(1))


class Selected(NamedTuple):
    """Rows and positions of queries, [D, W], or of keys, [D, S]; -1 where there is none. For kernels."""

    rows: torch.Tensor
    positions: torch.Tensor


def identity(tensor: torch.Tensor) -> torch.Tensor:
    """The reduction of a single rank."""
    return tensor


@dataclass(frozen=True)
class Evidence:
    """What one layer of one prefill offers a score: D requests, W queries and S selected keys each.

    The selected keys of a request are its first w_sink positions and the last w_recent ones seen so far;
    query i sees those at positions <= i. An absent query or key has -1 as its row and its position. A
    request has at least one query.

    query: [tokens, heads, dim], any float dtype, last dimension contiguous.
    attention: [tokens, heads, dim], full attention's output of those queries, in the model's dtype.
    lse: float32 [tokens, heads], full attention's log-sum-exp of the scaled scores, to base 2 (FlashInfer's).
    keys, values: [rows, kv heads, dim].
    query_rows, query_positions: int32 [D, W], row in query, attention, lse and hidden; position in the
        request.
    key_rows, key_positions: int32 [D, S], row in keys and values, position in the request, none twice.
    scale: softmax scale.
    heads: how many of this rank's query heads are real. They come first; the others pad for tensor
        parallelism and are never counted. May be 0.
    total_heads: real heads of all ranks.
    hidden: [tokens, hidden], residual stream at the layer's input, before its norm.
    project: [n, heads * dim] -> [n, hidden], this rank's part of the output projection (padded heads
        included, and given as zeros): not reduced over ranks, no bias.
    reduce: sums a tensor over the tensor-parallel ranks and returns it; may work in place.
    reduce_max: likewise, the maximum.

    Raises:
        ValueError: a tensor has not the shape, dtype or layout that the kernels rely on.
    """

    query: torch.Tensor
    attention: torch.Tensor
    lse: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    query_rows: torch.Tensor
    query_positions: torch.Tensor
    key_rows: torch.Tensor
    key_positions: torch.Tensor
    scale: float
    heads: int
    total_heads: int
    hidden: torch.Tensor | None = None
    project: Callable[[torch.Tensor], torch.Tensor] | None = None
    reduce: Reduce = identity
    reduce_max: Reduce = identity

    def __post_init__(self) -> None:
        tokens, heads, dim = self.query.shape
        kv_heads = self.keys.shape[1]
        if self.attention.shape != self.query.shape or self.lse.shape != (tokens, heads):
            raise ValueError("evidence: query and attention are [tokens, heads, dim], lse is [tokens, heads]")
        if self.keys.shape != self.values.shape or self.keys.shape[2] != dim or heads % kv_heads:
            raise ValueError("evidence: keys and values are [rows, kv heads, dim], kv heads divides heads")
        if self.lse.dtype is not torch.float32:
            raise ValueError(f"evidence: lse is float32, not {self.lse.dtype}")
        if any(t.stride(-1) != 1 for t in (self.query, self.attention, self.keys, self.values)):
            raise ValueError("evidence: the last dimension of query, attention, keys, values is contiguous")
        for rows, positions in (
            (self.query_rows, self.query_positions),
            (self.key_rows, self.key_positions),
        ):
            if rows.shape != positions.shape or rows.dim() != 2 or rows.shape[0] != self.query_rows.shape[0]:
                raise ValueError(
                    "evidence: query rows and positions are [D, W], key rows and positions [D, S]"
                )
            if not (rows.dtype == positions.dtype == torch.int32):
                raise ValueError("evidence: rows and positions are int32")
            if not (rows.is_contiguous() and positions.is_contiguous()):
                raise ValueError("evidence: rows and positions are contiguous")
        if not 0 <= self.heads <= min(heads, self.total_heads):
            raise ValueError(f"evidence: {self.heads} real heads of {heads}, {self.total_heads} on all ranks")
        if self.hidden is not None and (self.hidden.shape[0] != tokens or self.hidden.stride(-1) != 1):
            raise ValueError("evidence: hidden is [tokens, hidden], last dimension contiguous")
