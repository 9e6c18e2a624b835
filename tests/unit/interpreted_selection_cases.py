"""Evidence made from explicit attention weights, and what every score must say about it, in float64.

For test_selection.py, interpreted_selection.py and loadtest/experiments/identify.py.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from lt_sglang.identify.scores.evidence import Evidence

LOG2E = 1.4426950408889634
TURN = threading.Lock()  # Triton's interpreter runs one kernel at a time


@dataclass(frozen=True)
class Case:
    """Requests as (tokens seen, positions of the deciding queries), the windows, and the layer's shape.

    real: real query heads (None: all). absent: absent entries scattered among the queries and the keys of
    every request. peak: how far apart the attention scores lie.
    """

    requests: tuple[tuple[int, tuple[int, ...]], ...]
    sink: int = 4
    recent: int = 12
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    hidden: int = 48
    real: int | None = None
    absent: int = 0
    dtype: torch.dtype = torch.float32
    peak: float = 2.0

    @property
    def real_heads(self) -> int:
        return self.heads if self.real is None else self.real


def last(length: int, queries: int) -> tuple[int, tuple[int, ...]]:
    """A request of ``length`` tokens that decides by its last queries."""
    return length, tuple(range(length - queries, length))


def selected(case: Case, length: int) -> list[int]:
    """Positions of the selected keys: sinks, then the recent ones that are not sinks."""
    sinks = min(case.sink, length)
    return [*range(sinks), *range(max(sinks, length - case.recent), length)]


@dataclass(frozen=True)
class Built:
    """Evidence of a case, the weight of its output projection, and the scores, float64 [D] by name."""

    evidence: Evidence
    weight: torch.Tensor
    expected: dict[str, torch.Tensor]


def build(case: Case, seed: int = 0, device: str = "cpu", spread: bool = False) -> Built:
    """Random tensors, rows in random order, and NaN in every row that no request owns.

    spread: tensors are slices of wider ones, as a fused projection hands them over.
    """
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    total = sum(length for length, _ in case.requests)
    rows = rng.sample(range(1, total + 8), total)
    keys, values = (torch.full((total + 8, case.kv_heads, case.dim), float("nan")) for _ in range(2))
    number = sum(len(positions) for _, positions in case.requests)
    tokens = rng.sample(range(1, number + 5), number)
    query, attention = (torch.full((number + 5, case.heads, case.dim), float("nan")) for _ in range(2))
    lse = torch.full((number + 5, case.heads), float("nan"))
    hidden = torch.full((number + 5, case.hidden), float("nan"))
    weight = draw(case.heads * case.dim, case.hidden).to(case.dtype) * case.hidden**-0.5
    # What the padded heads would add to the stream, were they not zeros.
    weight[case.real_heads * case.dim :] = 100.0

    group = case.heads // case.kv_heads
    width = max(len(positions) for _, positions in case.requests) + case.absent
    span = max(len(selected(case, length)) for length, _ in case.requests) + case.absent
    entries: dict[str, list[list[int]]] = {"queries": [], "positions": [], "keys": [], "places": []}
    expected: dict[str, list[float]] = {
        "lighttransfer": [],
        "residual-error": [],
        "discarded-mass": [],
        "error-mass": [],
        "squeeze": [],
    }
    row_at = token_at = 0
    for length, positions in case.requests:
        mine = rows[row_at : row_at + length]
        row_at += length
        keys[mine] = draw(length, case.kv_heads, case.dim).to(case.dtype).float()
        values[mine] = draw(length, case.kv_heads, case.dim).to(case.dtype).float()
        chosen = selected(case, length)
        mass, error, cosine = [], [], []
        all_keys = keys[mine].double().repeat_interleave(group, 1)
        all_values = values[mine].double().repeat_interleave(group, 1)
        for offset, position in enumerate(positions):
            token = tokens[token_at + offset]
            query[token] = (draw(case.heads, case.dim) * case.peak).to(case.dtype).float()
            hidden[token] = draw(case.hidden).to(case.dtype).float()
            score = torch.einsum("hc,shc->hs", query[token].double(), all_keys[: position + 1])
            score = score * case.dim**-0.5
            share = score.softmax(1)
            lse[token] = (score.logsumexp(1) * LOG2E).float()
            full = torch.einsum("hs,shc->hc", share, all_values[: position + 1])
            attention[token] = full.to(case.dtype).float()
            seen = [place for place in chosen if place <= position]
            part = share[:, seen]
            streamed = torch.einsum("hs,shc->hc", part / part.sum(1, keepdim=True), all_values[seen])
            mass.append(part.sum(1)[: case.real_heads])
            before = hidden[token].double()

            def projected(heads: torch.Tensor) -> torch.Tensor:
                real = heads[: case.real_heads].flatten()
                return real @ weight[: len(real)].double()

            error.append(projected(full - streamed).norm() / before.norm())
            after = before + projected(full)
            cosine.append(torch.dot(before, after) / (before.norm() * after.norm()))
        if case.real_heads:
            expected["lighttransfer"].append(float(torch.stack(mass).mean()))
            expected["discarded-mass"].append(-float((1 - torch.stack(mass)).max()))
        expected["residual-error"].append(-float(torch.stack(error).max()))
        if case.real_heads:
            expected["error-mass"].append(
                -float(torch.stack(error).max()) * float((1 - torch.stack(mass)).max())
            )
        expected["squeeze"].append(float(torch.stack(cosine).mean()))

        def scatter(taken: list[int], positions: list[int], size: int) -> tuple[list[int], list[int]]:
            places = sorted(rng.sample(range(size), len(taken)))
            out = [-1] * size, [-1] * size
            for place, row, position in zip(places, taken, positions, strict=True):
                out[0][place], out[1][place] = row, position
            return out

        where = scatter(tokens[token_at : token_at + len(positions)], list(positions), width)
        entries["queries"].append(where[0])
        entries["positions"].append(where[1])
        where = scatter([mine[place] for place in chosen], chosen, span)
        entries["keys"].append(where[0])
        entries["places"].append(where[1])
        token_at += len(positions)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(device, case.dtype)
        if not spread:
            return tensor
        wide = torch.full(
            (len(tensor), tensor[0].numel() + 32), float("nan"), dtype=case.dtype, device=device
        )
        wide[:, 16:-16] = tensor.flatten(1)
        return wide[:, 16:-16].view(tensor.shape)

    def index(name: str) -> torch.Tensor:
        return torch.tensor(entries[name], dtype=torch.int32, device=device)

    weight = weight.to(device)
    evidence = Evidence(
        query=place(query),
        attention=place(attention),
        lse=lse.to(device),
        keys=place(keys),
        values=place(values),
        query_rows=index("queries"),
        query_positions=index("positions"),
        key_rows=index("keys"),
        key_positions=index("places"),
        scale=case.dim**-0.5,
        heads=case.real_heads,
        total_heads=max(case.real_heads, 1),
        hidden=place(hidden),
        project=lambda rows: rows @ weight,
    )
    return Built(evidence, weight, {k: torch.tensor(v, dtype=torch.float64) for k, v in expected.items()})


def ranks(built: Built, parts: list[tuple[slice, int]], kv_parts: list[slice]) -> list[Evidence]:
    """A layer's evidence as tensor-parallel ranks hold it: query heads with the real ones' number, kv heads.

    Their reductions wait for each other, so evaluate them by ``on_all_ranks``.
    """
    barrier = threading.Barrier(len(parts))
    slots: list[torch.Tensor | None] = [None] * len(parts)
    evidence = built.evidence
    dim = evidence.query.shape[2]

    def reducer(rank: int, combine: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            slots[rank] = tensor.clone()
            TURN.release()
            barrier.wait(60)
            # In place, as an all-reduce does it.
            tensor.copy_(combine(torch.stack([slot for slot in slots if slot is not None])))
            barrier.wait(60)
            TURN.acquire()
            return tensor

        return reduce

    def projection(heads: slice) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = built.weight.unflatten(0, (-1, dim))[heads].flatten(0, 1)
        return lambda rows: rows @ weight

    return [
        replace(
            evidence,
            query=evidence.query[:, heads],
            attention=evidence.attention[:, heads],
            lse=evidence.lse[:, heads],
            keys=evidence.keys[:, kv_heads],
            values=evidence.values[:, kv_heads],
            heads=real,
            project=projection(heads),
            reduce=reducer(rank, lambda parts: parts.sum(0)),
            reduce_max=reducer(rank, lambda parts: parts.amax(0)),
        )
        for rank, ((heads, real), kv_heads) in enumerate(zip(parts, kv_parts, strict=True))
    ]


def on_all_ranks(
    laziness: Callable[[Evidence], torch.Tensor], evidence: list[Evidence]
) -> list[torch.Tensor]:
    """``laziness`` of every rank; one rank computes while the others wait for its part of a reduction."""

    def run(part: Evidence) -> torch.Tensor:
        with TURN:
            return laziness(part)

    with ThreadPoolExecutor(len(evidence)) as pool:
        return list(pool.map(run, evidence))
