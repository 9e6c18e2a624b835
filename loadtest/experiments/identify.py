"""The scores on a GPU: equal to plain float32 torch, and how long a layer takes.

    python -m loadtest.experiments.identify OUT.json

Needs torch and Triton, no SGLang. Times are GPU microseconds a layer: the median over replays of one CUDA
graph, divided by its LAYERS layers, each with tensors of its own, so that no layer finds its keys or its
projection in the L2 cache (where a prefill would have left some of them). ``host`` is what launching takes.
Exits with 1 if a score is off.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from loadtest.experiments.offline import stamped
from loadtest.experiments.timing import graph_clock
from lt_sglang.identify.scores.attend_kernel import attend
from lt_sglang.identify.scores.base import Score
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.identify.scores.factory import SCORES, get_score
from lt_sglang.identify.scores.mass_kernel import mean_mass
from lt_sglang.identify.scores.row_kernels import mean_cosine, negative_ratio, output_rows

LAYERS = 32
REPLAYS = 30
LOG2E = 1.4426950408889634
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Shape:
    """D requests of the given lengths decide by their last W queries on sink + recent keys."""

    name: str
    lengths: tuple[int, ...] = (3000,)
    queries: int = 32
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    hidden: int = 4096
    real: int | None = None
    sink: int = 4
    recent: int = 1020
    dtype: str = "bfloat16"
    timed: bool = False


SHAPES = (
    Shape("Mistral-7B", timed=True),
    Shape("Mistral-7B, first chunk", queries=128, timed=True),
    Shape("Mistral-7B, 4 requests", lengths=(3000, 1500, 900, 5000), timed=True),
    Shape("Llama-3-70B, rank of 8", heads=8, kv_heads=1, hidden=8192, timed=True),
    Shape("Qwen2.5-32B, 129 + 1025", heads=40, hidden=5120, sink=129, recent=1025, timed=True),
    Shape("SmolLM2-135M", heads=9, kv_heads=3, dim=64, hidden=576, timed=True),
    Shape("head size 256", heads=16, dim=256, hidden=3584, timed=True),
    Shape("head size 96, padded heads", heads=32, kv_heads=32, dim=96, hidden=3072, real=29),
    Shape("head size 80, one query", queries=1, heads=32, kv_heads=32, dim=80, hidden=2560),
    Shape("256 queries, 2048 keys, 16 heads a kv head", (4000, 300), 256, 32, 2, recent=2044),
    Shape(
        "14 heads over 2, window longer than the prompt", (700, 40), heads=14, kv_heads=2, dim=64, hidden=896
    ),
    Shape("no sinks, float16", sink=0, recent=1024, dtype="float16"),
    Shape("float32", (1500, 600), heads=8, kv_heads=2, dim=64, hidden=512, dtype="float32"),
    Shape("float32, head size 256", (1500,), heads=4, kv_heads=2, dim=256, hidden=1024, dtype="float32"),
)


def make(shape: Shape, seed: int) -> Evidence:
    """One layer's evidence: scores far enough apart that some heads retrieve, rows in random order."""
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    group = shape.heads // shape.kv_heads

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device="cuda").to(dtype)

    def column(values: torch.Tensor, width: int) -> torch.Tensor:
        absent = torch.full((width - len(values),), -1, dtype=torch.int64, device="cuda")
        return torch.cat([values, absent]).to(torch.int32)

    total = sum(shape.lengths)
    rows = torch.randperm(total + 64, generator=generator, device="cuda")
    keys, values = (draw(total + 64, shape.kv_heads, shape.dim) for _ in range(2))
    counts = [min(shape.queries, length) for length in shape.lengths]
    tokens = sum(counts)
    # A slice of a fused projection, as models hand it over.
    width = (shape.heads + 2 * shape.kv_heads) * shape.dim
    query = (draw(tokens, width) * 2)[:, : shape.heads * shape.dim].unflatten(1, (shape.heads, shape.dim))
    attention = torch.empty(tokens, shape.heads, shape.dim, dtype=dtype, device="cuda")
    lse = torch.empty(tokens, shape.heads, device="cuda")
    span = max(min(length, shape.sink + shape.recent) for length in shape.lengths)
    columns: list[tuple[torch.Tensor, ...]] = []
    row_at = token_at = 0
    for length, count in zip(shape.lengths, counts, strict=True):
        mine = rows[row_at : row_at + length]
        positions = torch.arange(length - count, length, device="cuda")
        mine_query = query[token_at : token_at + count].float().unflatten(1, (shape.kv_heads, group))
        score = torch.einsum("wkgc,skc->wkgs", mine_query, keys[mine].float()) * shape.dim**-0.5
        later = torch.arange(length, device="cuda")[None, :] > positions[:, None]
        score = score.masked_fill(later[:, None, None], float("-inf"))
        full = torch.einsum("wkgs,skc->wkgc", score.softmax(3), values[mine].float())
        attention[token_at : token_at + count] = full.flatten(1, 2).to(dtype)
        lse[token_at : token_at + count] = score.logsumexp(3).flatten(1, 2) * LOG2E
        first = max(length - shape.recent, 0)
        chosen = [*range(min(shape.sink, first)), *range(first, length)]
        places = torch.tensor(chosen, device="cuda")
        columns.append(
            (
                column(torch.arange(token_at, token_at + count, device="cuda"), shape.queries),
                column(positions, shape.queries),
                column(mine[places], span),
                column(places, span),
            )
        )
        row_at, token_at = row_at + length, token_at + count
    weight = draw(shape.heads * shape.dim, shape.hidden) * shape.hidden**-0.5
    query_rows, query_positions, key_rows, key_positions = (
        torch.stack(part) for part in zip(*columns, strict=True)
    )
    real = shape.heads if shape.real is None else shape.real
    return Evidence(
        query=query,
        attention=attention,
        lse=lse,
        keys=keys,
        values=values,
        query_rows=query_rows,
        query_positions=query_positions,
        key_rows=key_rows,
        key_positions=key_positions,
        scale=shape.dim**-0.5,
        heads=real,
        total_heads=real,
        hidden=draw(tokens, shape.hidden),
        project=lambda rows: rows @ weight,
    )


def gpu_us(layers: list[Evidence], work: Callable[[int, Evidence], object]) -> float:
    """GPU time of ``work`` for one layer, in microseconds."""
    clock = graph_clock(lambda: [work(*pair) for pair in enumerate(layers)], replays=REPLAYS)
    return clock() / len(layers)


def host_us(layers: list[Evidence], work: Callable[[int, Evidence], object]) -> float:
    """Host time to launch ``work`` for one layer, in microseconds."""
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index, layer in enumerate(layers):
            work(index, layer)
        times.append((time.perf_counter() - start) * 1e6 / len(layers))
    return median(times)


def _fused(score: Score, layer: int, evidence: Evidence) -> torch.Tensor:
    return score.fused(evidence)


def time_shape(shape: Shape) -> dict[str, float]:
    """Microseconds a layer of each kernel, of the projection, and of each score."""
    layers = [make(shape, seed) for seed in range(LAYERS)]
    splits = [attend(layer, with_values=True) for layer in layers]
    rows = [output_rows(layer, part) for layer, part in zip(layers, splits, strict=True)]
    projected = [layer.project(part[0]) for layer, part in zip(layers, rows, strict=True)]  # type: ignore[misc]
    work: dict[str, Callable[[int, Evidence], object]] = {
        "attend, scores only": lambda i, e: attend(e, with_values=False),
        "attend": lambda i, e: attend(e, with_values=True),
        "mean_mass": lambda i, e: mean_mass(e, splits[i]),
        "output_rows": lambda i, e: output_rows(e, splits[i]),
        "projection": lambda i, e: e.project(rows[i][0]),  # type: ignore[misc]
        "negative_ratio": lambda i, e: negative_ratio(e, projected[i], rows[i][1]),
        "mean_cosine": lambda i, e: mean_cosine(e, projected[i]),
    }
    scores = {name: get_score(name) for name in SCORES}
    work |= {name: partial(_fused, score) for name, score in scores.items()}
    times = {name: round(gpu_us(layers, task), 2) for name, task in work.items()}
    times |= {f"{name}, host": round(host_us(layers, work[name]), 1) for name in SCORES}
    times["reference of lighttransfer"] = round(
        gpu_us(layers[:4], lambda i, e: scores["lighttransfer"].reference(e)), 1
    )
    return times


def check_shape(shape: Shape) -> dict[str, float]:
    """Largest difference of each score from its reference, as a share of it (but at least of 0.05)."""
    off = {}
    for name in SCORES:
        score, worst = get_score(name), 0.0
        for seed in range(3):
            evidence = make(shape, seed)
            expected, got = score.reference(evidence), score.fused(evidence)
            if not torch.equal(got, score.fused(evidence)):
                worst = float("inf")
            error = ((got - expected).abs() / expected.abs().clamp(min=0.05)).max().item()
            # Not a number is wrong too, and a comparison would not show it.
            worst = max(worst, error if error == error else float("inf"))
        off[name] = worst
    return off


def main(out: Path) -> int:
    what = "GPU time of scoring one layer, microseconds; median of CUDA graph replays, cold caches"
    report = stamped("identify", what)
    print(f"{report['hardware']}, {report['versions']}")
    results = []
    failed = False
    for shape in SHAPES:
        off = check_shape(shape)
        good = all(error <= TOLERANCE[getattr(torch, shape.dtype)] for error in off.values())
        failed |= not good
        times = time_shape(shape) if shape.timed else {}
        results.append({"shape": asdict(shape), "error": off, "good": good, "us_per_layer": times})
        errors = ", ".join(f"{name} {error:.1e}" for name, error in off.items())
        print(f"{'ok' if good else 'OFF':4}{shape.name}: {errors}", flush=True)
        for name, value in times.items():
            print(f"      {name:32}{value:9.2f} us")
    report["results"] = results
    out.write_text(json.dumps(report, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
