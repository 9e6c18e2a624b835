"""Bar 4 of conversations: a 16K prefix that comes back from host memory (HiCache), against computing it.

    python -m loadtest.experiments.host_cache OUT [--only stock,static,dynamic] [--rounds 3] [--rehearse]

One request at a time. The device holds two prompts, six are sent in turn, so that each was driven out when it
comes again, and is read from host memory. Then it is sent twice more and read from the device: after a pause
(the server is asked for its metrics, as before the first time), and without one. Stock SGLang has HiCache
too, and moves K and V of all layers. How long copies took and what they moved tells the server's /metrics;
how fast this machine copies from pinned memory is measured before. OUT/report.json is a result file.

--rehearse: a tiny model on a CPU, for the counts; times mean nothing there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch

from loadtest.experiments.offline import stamped
from lt_sglang.bench.client import EVENT
from lt_sglang.bench.metrics_page import scrape, totals
from lt_sglang.bench.servers import SHAPE_FLAGS, write_shape
from lt_sglang.bench.wire import Answer, read_event
from lt_sglang.launch.engine import Engine, EngineSpec

ROOT = Path(__file__).resolve().parents[2]
SHAPE, SEED, OUTPUT, PROMPTS = "mistral-7b", 1, 16, 6
# From the hit to the last layer, against the bytes at the measured rate; TTFT against computing the prompt.
COPY_BOUND, TTFT_BOUND = 1.5, 0.2
OURS = {"static": ("--lt-lazy-layers", "8-23"), "dynamic": ("--lt-mode", "dynamic", "--lt-keep", "16")}


@dataclass(frozen=True)
class Size:
    """tokens: of a prompt. vocabulary: of the shape. flags: SGLang's, for all engines. lazy: for ours."""

    tokens: int
    vocabulary: int
    flags: tuple[str, ...]
    lazy: tuple[str, ...]


GPU = Size(
    16384,
    32000,
    (
        *SHAPE_FLAGS,
        *("--mem-fraction-static", "0.7", "--max-total-tokens", "40000", "--chunked-prefill-size", "8192"),
        *("--page-size", "16", "--enable-hierarchical-cache", "--hicache-size", "24", "--enable-metrics"),
        *("--disable-prefill-cuda-graph", "--cuda-graph-bs-decode", "1", "2", "--random-seed", "1"),
    ),
    ("--lt-sink-tokens", "4", "--lt-recent-tokens", "1020"),
)


def copy_rate() -> float:
    """Bytes a second from pinned host memory to the GPU; the best of five copies of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    best = 0.0
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, source.nbytes / (time.perf_counter() - began))
    del source, target
    torch.cuda.empty_cache()
    return best


def loads(engine: Engine) -> tuple[float, float, float]:
    """Bytes that HiCache has brought back since the start, in how many seconds, in how many loads."""
    found = totals(scrape(engine.url) or "")
    moved, seconds, count = (
        found.get(f"load_back_{name}", 0.0)
        for name in ("bytes_total", "duration_seconds_sum", "duration_seconds_count")
    )
    return moved, seconds, count


def ask(engine: Engine, prompt: list[int]) -> dict[str, Any]:
    """Time to the first token in ms, cached tokens, and the output."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": OUTPUT, "ignore_eos": True},
        "stream": True,
    }
    answer, began, first = Answer(), time.perf_counter(), 0.0
    with requests.post(f"{engine.url}/generate", json=body, stream=True, timeout=120) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(EVENT) and not line.endswith(b"[DONE]"):
                first = first or time.perf_counter()
                read_event("generate", line.removeprefix(EVENT), answer)
    return {
        "ttft_ms": 1e3 * (first - began),
        "cached": answer.cached_tokens,
        "output": answer.output_ids,
    }


def measure(engine: Engine, size: Size, rounds: int) -> dict[str, Any]:
    """What one engine does; prompts are its own."""
    rng = random.Random(SEED)
    prompts = [[rng.randrange(10, size.vocabulary) for _ in range(size.tokens)] for _ in range(PROMPTS)]
    ask(engine, [rng.randrange(10, size.vocabulary) for _ in range(size.tokens)])  # kernels are compiled
    cold = [ask(engine, prompt) for prompt in prompts]
    ask(engine, prompts[0])  # the copying kernels
    host, device, at_once, copies = [], [], [], []
    for _ in range(rounds):
        for prompt in prompts[1:]:
            before = loads(engine)
            host.append(ask(engine, prompt))
            time.sleep(0.05)  # the copy is counted in the scheduler's next round
            moved, seconds, count = (b - a for a, b in zip(before, loads(engine), strict=True))
            copies.append({"bytes": moved, "seconds": seconds, "loads": count})
            device.append(ask(engine, prompt))
            at_once.append(ask(engine, prompt))
        ask(engine, prompts[0])
    return {
        "cold": cold,
        "host": host,
        "device": device,
        "device_at_once": at_once,
        "copies": copies,
        "same_output": sum(a["output"] == b["output"] for a, b in zip(host, device, strict=True)),
    }


def summary(found: dict[str, Any], rate: float | None, tokens: int) -> dict[str, Any]:
    """Medians, and whether the bars hold; times only with a ``rate``, which there is on a GPU."""
    hits = [reply["cached"] for reply in found["host"]]
    told: dict[str, Any] = {
        "cached_from_host": min(hits),
        "of": tokens,
        "same_output_as_from_the_device": f"{found['same_output']} of {len(hits)}",
    }
    moved = [copy for copy in found["copies"] if copy["bytes"]]
    told["bytes"] = statistics.median(copy["bytes"] for copy in moved) if moved else 0
    if rate is None:
        return told
    kinds = ("cold", "host", "device", "device_at_once")
    ttft = {kind: statistics.median(r["ttft_ms"] for r in found[kind]) for kind in kinds}
    told |= {f"ttft_ms_{kind}": round(value, 1) for kind, value in ttft.items()}
    told["ttft_host_over_cold"] = round(ttft["host"] / ttft["cold"], 3)
    if moved:
        seconds = statistics.median(copy["seconds"] for copy in moved)
        told["copy_ms"] = round(1e3 * seconds, 1)
        told["copy_over_bound"] = round(seconds / (told["bytes"] / rate), 2)
        told["held"] = told["copy_over_bound"] <= COPY_BOUND and told["ttft_host_over_cold"] <= TTFT_BOUND
    return told


def rehearsal() -> tuple[Path, Size]:
    """A tiny model on a CPU."""
    from lt_sglang.launch.cpu import cpu_server_args
    from tests.engine.models import ensure_model

    flags = (
        *cpu_server_args(),
        *("--dtype", "float32", "--chunked-prefill-size", "256", "--context-length", "2048"),
        *("--max-total-tokens", "2600", "--mem-fraction-static", "0.3", "--page-size", "16"),
        *("--enable-hierarchical-cache", "--hicache-ratio", "8", "--enable-metrics"),
    )
    return ensure_model("llama"), Size(
        1024, 500, flags, ("--lt-sink-tokens", "4", "--lt-recent-tokens", "60")
    )


def main() -> int:
    """Every engine after the other; exit code 1 if a bar of ours is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="stock,static,dynamic")
    parser.add_argument("--baseline", default="fa3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start-seconds", type=float, default=240.0)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if args.rehearse:
        model, size = rehearsal()
        ours = {
            "static": ("--lt-lazy-layers", "1,3,5"),
            "dynamic": ("--lt-mode", "dynamic", "--lt-keep", "3"),
        }
        rate = None
    else:
        model, size, ours = write_shape(SHAPE, out / "model"), GPU, OURS
        rate = copy_rate()
    report = stamped("host-cache", "one request at a time, prompts that were driven out", tokens=size.tokens)
    report |= {"seed": SEED, "copy_bytes_per_second": rate, "engines": {}}
    good = True
    for name in args.only.split(","):
        stock = name == "stock"
        backend = "torch_native" if args.rehearse else args.baseline
        own = ("--attention-backend", backend) if stock else (*ours[name], *size.lazy)
        spec = EngineSpec(name, str(model), size.flags, own, stock=stock)
        try:
            with Engine(spec, out / f"{name}.log", start_seconds=args.start_seconds) as engine:
                found = measure(engine, size, args.rounds)
        except Exception as error:  # the others go on, and what there is is written
            report["engines"][name] = {"failed": str(error)[-800:]}
            print(f"{name}: FAILED: {str(error)[-300:]}", flush=True)
            good = False
        else:
            told = summary(found, rate, size.tokens)
            good &= stock or bool(told.get("held", args.rehearse))
            report["engines"][name] = {"summary": told, "measured": found}
            print(f"{name}: {told}", flush=True)
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
