"""Does a rank wait for another? Caches cut by layer against caches of equal memory cut by head.

    torchrun --nproc-per-node 8 -m loadtest.experiments.rank_imbalance --date DAY [--tokens 16384]

One decode step's attention of the Llama-3-70B shape under tensor parallelism: in each layer every rank reads
its own KV heads, then all ranks add up their outputs. *layer-wise*: half of the layers are lazy, in all
heads, as in LightTransfer. *head-wise*: half of all heads are lazy, drawn at random (the same on all ranks),
as in methods that choose heads. Both hold the same KV in all. The heads of a rank are flattened into the
batch, for both, so that one kernel serves any mix of lengths.

Rank 0 prints the times and, on GPUs, writes a result file. On a CPU (gloo, torch's attention) the script can
only be tried. Needs FlashInfer on a GPU; starts no SGLang.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lt_sglang.bench.machine import stamp, this_machine
from lt_sglang.bench.result_file import write
from lt_sglang.planner.shapes import SHAPES

WARMUP, STEPS = 3, 20
WORKSPACE = 128 * 2**20
# Which of a rank's KV heads are lazy, in one layer.
Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Work:
    """requests of tokens each; lazy heads read window tokens."""

    layers: int
    q_heads: int
    kv_heads: int
    dim: int
    requests: int
    tokens: int
    window: int = 1024


def layer_wise(work: Work) -> list[Mask]:
    """Every second layer lazy, in all heads."""
    return [(layer % 2 == 1,) * work.kv_heads for layer in range(work.layers)]


def head_wise(work: Work, seed: int) -> list[Mask]:
    """As many lazy heads in all, anywhere."""
    places = [(layer, head) for layer in range(work.layers) for head in range(work.kv_heads)]
    lazy = set(random.Random(seed).sample(places, len(places) // 2))
    return [tuple((layer, head) in lazy for head in range(work.kv_heads)) for layer in range(work.layers)]


def attention(work: Work, device: torch.device, masks: set[Mask]) -> dict[Mask, Callable[[], torch.Tensor]]:
    """For each mask of a rank's heads a call that attends; outputs [requests, the rank's hidden width]."""
    heads = len(next(iter(masks)))
    group = work.q_heads // work.kv_heads
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Every layer reads the same rows: far more than an L2 cache holds.
    rows = work.requests * heads * work.tokens
    keys, values = (torch.randn(rows, 1, work.dim, device=device, dtype=dtype) for _ in range(2))
    query = torch.randn(work.requests * heads, group, work.dim, device=device, dtype=dtype)
    build = _flashinfer if device.type == "cuda" else _torch
    calls = {}
    for mask in masks:
        lengths = [work.window if lazy else work.tokens for _ in range(work.requests) for lazy in mask]
        calls[mask] = build(work, query, keys, values, lengths)
    return calls


def _flashinfer(
    work: Work, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: list[int]
) -> Callable[[], torch.Tensor]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    device = query.device
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=device), "NHD", use_tensor_cores=True
    )
    starts = range(0, len(lengths) * work.tokens, work.tokens)
    indices = torch.cat(
        [torch.arange(at, at + n, dtype=torch.int32) for at, n in zip(starts, lengths, strict=True)]
    )
    indptr = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    last = torch.ones(len(lengths), dtype=torch.int32)
    wrapper.plan(
        *(part.to(device) for part in (indptr, indices, last)),
        query.shape[1],
        1,
        work.dim,
        1,
        q_data_type=query.dtype,
        kv_data_type=keys.dtype,
    )
    # [rows, page of 1, one head, dim]
    cache = keys.unsqueeze(1), values.unsqueeze(1)
    return _captured(lambda: wrapper.run(query, cache).reshape(work.requests, -1))


def _captured(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """``call`` as a CUDA graph: a lazy layer takes the GPU less time than Python takes to launch it."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog thread asks the driver meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def _torch(
    work: Work, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: list[int]
) -> Callable[[], torch.Tensor]:
    attend = torch.nn.functional.scaled_dot_product_attention

    def call() -> torch.Tensor:
        outputs = []
        for one, length in enumerate(lengths):
            rows = slice(one * work.tokens, one * work.tokens + length)
            outputs.append(attend(query[one].unsqueeze(1), keys[rows, 0][None], values[rows, 0][None]))
        return torch.stack(outputs).reshape(work.requests, -1)

    return call


def measure(
    work: Work, masks: list[Mask], calls: dict[Mask, Callable[[], torch.Tensor]], device: torch.device
) -> tuple[float, float]:
    """Milliseconds of this rank's attention in a step, and of the whole step with its sums; medians."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    heads = work.kv_heads // ranks
    mine = [mask[rank * heads : (rank + 1) * heads] for mask in masks]
    busy, whole = [], []
    for number in range(WARMUP + STEPS):
        dist.barrier()
        _wait(device)
        start, spent = time.perf_counter(), []
        for mask in mine:
            before = _mark(device)
            output = calls[mask]()
            spent.append((before, _mark(device)))
            dist.all_reduce(output)
        _wait(device)
        if number >= WARMUP:
            whole.append(1000 * (time.perf_counter() - start))
            busy.append(sum(_between(before, after) for before, after in spent))
    return statistics.median(busy), statistics.median(whole)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    if isinstance(before, float):
        return 1000 * (after - before)
    return float(before.elapsed_time(after))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(work: Work, device: torch.device, seed: int) -> dict[str, dict[str, Any]]:
    """Both layouts: attention of each rank, the ranks' spread, the step, and KV of each rank."""
    ranks = dist.get_world_size()
    heads = work.kv_heads // ranks
    layouts = {"layer-wise": layer_wise(work), "head-wise": head_wise(work, seed)}
    rank = dist.get_rank()
    used = {mask[rank * heads : (rank + 1) * heads] for masks in layouts.values() for mask in masks}
    calls = attention(work, device, used)
    found: dict[str, dict[str, Any]] = {}
    for name, masks in layouts.items():
        each: list[Any] = [None] * ranks
        dist.all_gather_object(each, measure(work, masks, calls, device))
        busy = [one[0] for one in each]
        kept = [_kept(work, [mask[r * heads : (r + 1) * heads] for mask in masks]) for r in range(ranks)]
        found[name] = {
            "attention_ms_by_rank": [round(one, 4) for one in busy],
            "rank_spread": round((max(busy) - min(busy)) / statistics.mean(busy), 4),
            "step_ms": round(max(one[1] for one in each), 4),
            "kv_share_by_rank": [round(one / sum(kept), 4) for one in kept],
        }
    return found


def _kept(work: Work, masks: list[Mask]) -> int:
    """Tokens of one request that the heads of ``masks`` keep."""
    return sum(work.window if lazy else work.tokens for mask in masks for lazy in mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-70b")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--date", default="undated")
    parser.add_argument("--out", type=Path, default=Path("loadtest/results"))
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    shape = SHAPES[args.shape]
    work = Work(
        args.layers or shape.layers, shape.q_heads, shape.kv_heads, shape.head_dim, args.requests, args.tokens
    )
    if work.kv_heads % dist.get_world_size() or work.tokens <= work.window:
        raise SystemExit(f"ranks must divide {work.kv_heads} KV heads, and --tokens be above {work.window}")
    found = compare(work, device, args.seed)
    if dist.get_rank() == 0:
        print(json.dumps(found, indent=1))
        if on_gpu:
            print(_write(args, work, found))
    dist.destroy_process_group()


def _write(args: argparse.Namespace, work: Work, found: dict[str, dict[str, Any]]) -> Path:
    machine, ranks = this_machine(), dist.get_world_size()
    head, layer = found["head-wise"], found["layer-wise"]
    result = {
        **stamp(f"rank-imbalance-tp{ranks}-{work.tokens}", machine, args.seed),
        "workload": {
            "about": "attention of a decode step, half the KV kept",
            "shape": args.shape,
            **asdict(work),
        },
        "baseline": {"engine": "head-wise", **head},
        "lighttransfer": {"engine": "layer-wise", **layer},
        "ratio": {"step_speed": round(head["step_ms"] / layer["step_ms"], 4)},
        "notes": ["Attention and all-reduce alone, both sides with the same kernel; no engine."],
    }
    return write(result, args.out, args.date, machine.label)


if __name__ == "__main__":
    main()
