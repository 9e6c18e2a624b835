"""Everything this project claims about a GPU, in one command.

    python tests/gpu/run.py OUT_FOLDER [--only parity,steady,...] [--budget-s 540]
    python tests/gpu/run.py OUT_FOLDER --only tp --tp 2     (CUDA_VISIBLE_DEVICES chooses the GPUs)

Each step is one engine process with a time limit; a step that would not fit what is left of the budget is
skipped and said so. A table comes last. Files in OUT_FOLDER: report.json, and per step its log.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lt_sglang.bench.decode_log import steady_of
from tests.gpu import parity, trace
from tests.gpu.jobs import Job, available_gb, gpu_used_mib, task_logs
from tests.gpu.shapes import LLAMA_70B, MISTRAL_7B, QWQ_32B, Shape


def engine_args(model: Path, **extra: Any) -> dict[str, Any]:
    """The same for every engine of a comparison, the baseline included."""
    return {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "grammar_backend": "none",
        "random_seed": 1,
        "log_level": "info",
        "decode_log_interval": 10,
        **extra,
    }


def lazy(layers: str, sink: int, recent: int, expected: int, output: int) -> dict[str, Any]:
    """Engine arguments that switch lazy layers on."""
    return hybrid(sink, recent, expected, output, lazy_layers=layers)


def hybrid(sink: int, recent: int, expected: int, output: int, **options: Any) -> dict[str, Any]:
    """Engine arguments of either mode; ``options`` are keys of the configuration."""
    config = {
        "sink_tokens": sink,
        "recent_tokens": recent,
        "expected_tokens": expected,
        "expected_output_tokens": output,
        **options,
    }
    return {
        "attention_backend": "lighttransfer",
        "json_model_override_args": json.dumps({"lighttransfer": config}),
    }


@dataclass(frozen=True)
class Step:
    """One engine: its name, keyword arguments, tasks, time limit in seconds, environment."""

    name: str
    engine: dict[str, Any]
    tasks: list[dict[str, Any]]
    limit_s: float
    vocab: int = 512
    env: dict[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        """What engine_job.py reads."""
        return {"engine": self.engine, "tasks": self.tasks, "vocab": self.vocab}


class Run:
    """One run: its folder, its clock, its report.

    common: engine arguments that hold for every step which does not say otherwise.
    """

    def __init__(self, folder: Path, budget_s: float, common: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.common = common or {}
        self.deadline = time.monotonic() + budget_s
        self.report: dict[str, Any] = {}
        self.table: list[str] = []
        self._waiting: dict[str, Job] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def launch(self, steps: list[Step]) -> None:
        """Let the steps' engines import SGLang and wait for the GPU."""
        for step in steps:
            if step.name not in self._waiting:
                spec = {**step.spec, "engine": {**self.common, **step.engine}}
                self._waiting[step.name] = Job(step.name, spec, self.folder, step.env)

    def jobs(self, steps: list[Step]) -> Iterator[tuple[Step, dict[str, Any] | None]]:
        """Run the steps one after the other, each within its limit and what is left of the budget."""
        for index, step in enumerate(steps):
            self.launch(steps[index : index + 2])
            used = gpu_used_mib()
            left = self.deadline - time.monotonic()
            job = self._waiting.pop(step.name)
            if left < min(45.0, step.limit_s):
                job.stop()
                self.say(f"{step.name}: skipped, {left:.0f} s left of the budget")
                yield step, None
            else:
                print(f"{step.name}: {left:.0f} s left, GPU memory in use {used} MiB", flush=True)
                yield step, job.run(min(step.limit_s, left))

    def jobs_together(self, steps: list[Step]) -> list[tuple[Step, dict[str, Any] | None]]:
        """Run small engines side by side; for results, not for times."""
        self.launch(steps)
        waiting = [self._waiting.pop(step.name) for step in steps]
        limit = min(max(step.limit_s for step in steps), self.deadline - time.monotonic())
        with ThreadPoolExecutor(len(steps)) as pool:
            return list(zip(steps, pool.map(lambda job: job.run(max(limit, 1)), waiting), strict=True))

    def close(self) -> None:
        """End every engine that still waits."""
        for job in self._waiting.values():
            job.stop()
        self._waiting.clear()

    def say(self, line: str) -> None:
        """Add a line to the table."""
        self.table.append(line)
        print(line, flush=True)

    def save(self) -> None:
        """Write the report."""
        (self.folder / "report.json").write_text(json.dumps(self.report, indent=1))


PARITY = ("stock", "graph", "eager")
FP8 = ("fp8_stock", "fp8_stock_paged", "fp8")
FA2 = ("fa2_stock", "fa2_graph", "fa2_eager")
# Whose error is bounded by whose. Stock SGLang's prefill reads fp8 keys of earlier chunks only, unless it is
# told to write them first ("paged"); lazy layers always read what they wrote.
BOUNDS = (
    ("graph", "stock"),
    ("graph_again", "stock"),
    ("eager", "stock"),
    ("eager_hits", "stock_hits"),
    ("fp8", "fp8_stock"),
    ("fp8_again", "fp8_stock"),
    ("fp8", "fp8_stock_paged"),
    ("fa2_graph", "fa2_stock"),
    ("fa2_graph_again", "fa2_stock"),
    ("fa2_eager", "fa2_stock"),
)


def parity_steps(model: Path, names: tuple[str, ...], limit_s: float) -> list[Step]:
    """Engines that score the same prompts.

    stock: no lazy layers. graph: CUDA graphs, a pool so small that slots are reused all the time, and the
    prompts twice. eager: neither. fp8: graph with an fp8 KV cache. fa2: without FA3, as on an A100.
    """
    common = {"chunked_prefill_size": 1024, "mem_fraction_static": 0.3}
    quick = {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": [1, 2, 4, 8, 12]}
    on = lazy(",".join(map(str, parity.LAZY)), parity.SINK, parity.RECENT, 2048, parity.NEW_TOKENS)
    stock = engine_args(model, **common, max_total_tokens=40000, attention_backend="flashinfer")
    # About twice the longest request.
    graph = engine_args(model, **common, max_total_tokens=12000, **on)
    eager = engine_args(model, **common, max_total_tokens=40000, **on, disable_cuda_graph=True)
    fp8 = {**quick, "kv_cache_dtype": "fp8_e4m3"}
    engines: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "stock": (stock, {}),
        "graph": (graph, {}),
        "eager": (eager, {}),
        "fp8_stock": (stock | fp8, {}),
        "fp8_stock_paged": (stock | fp8, {"SGLANG_FLASHINFER_USE_PAGED": "1"}),
        "fp8": (graph | fp8, {}),
        "fa2_stock": (stock | quick, {"LT_FORCE_FA2": "1"}),
        "fa2_graph": (graph | quick, {"LT_FORCE_FA2": "1"}),
        "fa2_eager": (eager, {"LT_FORCE_FA2": "1"}),
    }
    score = {"kind": "score", "prompts": parity.prompts(), "new_tokens": parity.NEW_TOKENS}
    steps = []
    for name in names:
        engine, env = engines[name]
        # The graph engines' pools are too small to keep a prefix.
        tasks = [score, parity.hits_task()] if "stock" in name or "eager" in name else [score] * 2
        steps.append(Step(name, engine, tasks, limit_s, env={"LT_WATCH": "1", **env}))
    return steps


def run_parity(run: Run, names: tuple[str, ...] = PARITY, limit_s: float = 200) -> None:
    """Log-probabilities of the engines ``names`` against float32."""
    # A process of its own, so that the float32 model's GPU memory is gone when engines are measured.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as reference:
        model = reference.submit(parity.make_model, Path("/tmp/lt-parity-model")).result()
        steps = parity_steps(model, names, limit_s)
        results = run.jobs_together(steps)
        outs = {step.name: result for step, result in results if result and result["tasks"]}
        work: list[parity.Work] = []
        hits: list[parity.Work] = []
        for name, result in outs.items():
            layers = () if "stock" in name else parity.LAZY
            work.append((name, result["tasks"][0], layers))
            for outputs in result["tasks"][1:]:
                if "logprobs" in outputs[0]:
                    hits.append((f"{name}_hits", outputs, layers))
                else:
                    work.append((f"{name}_again", outputs, layers))
        for name, label in (("graph", "full_mask_control"), ("fa2_graph", "fa2_full_mask_control")):
            if name in outs:
                work.append((label, outs[name]["tasks"][0], ()))
        found = reference.submit(parity.compare, model, work, hits).result()
    report = run.report.setdefault("parity", {})
    report.update(found)
    for label, error in found.items():
        run.say(f"parity {label:20s} " + "  ".join(f"{k} {v:.4g}" for k, v in error.items()))
    for label, noise in BOUNDS:
        if label in found and noise in found:
            good = "mean" in found[label] and (  # no hits, no mean
                found[label]["mean"] <= 1.25 * found[noise]["mean"]
                and found[label]["max"] <= 1.5 * found[noise]["max"]
            )
            run.say(f"parity {label} within the noise of {noise}: {'PASS' if good else 'FAIL'}")
    for one, other in (("graph", "eager"), ("fa2_graph", "fa2_eager")):
        if one in outs and other in outs:
            pairs = zip(outs[one]["tasks"][0], outs[other]["tasks"][0], strict=True)
            same = [a["output_ids"] == b["output_ids"] for a, b in pairs]
            report[f"{one}_equals_{other}"] = same
            run.say(f"parity {one} and {other}: {sum(same)} of {len(same)} greedy outputs equal")
    kernels = {name: _ragged_kernels(run.folder / f"{name}.log") for name in outs}
    report["ragged_prefill_kernels"] = {**report.get("ragged_prefill_kernels", {}), **kernels}
    for name, ran in kernels.items():
        run.say(f"parity {name}: ragged prefill of full layers ran {', '.join(ran) or 'never'}")
        if name.startswith("fa2") and ran != ["fa2"]:
            run.say(f"parity {name}: FAIL, FA2 was to be forced")


def _ragged_kernels(log: Path) -> list[str]:
    mark = "RAGGED PREFILL "
    return [line.split(mark)[1].strip() for line in log.read_text().splitlines() if mark in line]


def run_cells(run: Run, steps: list[Step]) -> None:
    """Steady decode and prefill times of each step's cells into the report."""
    for step, result in run.jobs(steps):
        if result is None:
            continue
        logs = task_logs((run.folder / f"{step.name}.log").read_text())
        engine = {**run.common, **step.engine}
        entry: dict[str, Any] = {"start_seconds": result["start_seconds"], "engine": engine, "cells": []}
        for task, value, lines in zip(step.tasks, result["tasks"], logs, strict=False):
            entry["cells"].append(_cell_result(run, step.name, task, value, lines))
        entry["available_gb"] = available_gb((run.folder / f"{step.name}.log").read_text())
        entry["lighttransfer"] = result.get("lighttransfer")
        entry["memory_usage"] = result.get("memory_usage")
        run.report.setdefault("steady", {})[step.name] = entry
        run.save()


def _cell_result(run: Run, name: str, task: dict[str, Any], value: Any, lines: list[str]) -> dict[str, Any]:
    if task["kind"] == "profile":
        run.say(f"{name:22s} profile {task['requests']} x {task['prompt_tokens']} + {task['new_tokens']}")
        for line in trace.lines(value):
            run.say(f"{'':22s} {line}")
        return {**task, **value}
    if task["kind"] == "prefill":
        run.say(f"{name:22s} prefill {task['prompt_tokens']}: " + " ".join(f"{s:.3f}" for s in value) + " s")
        return {**task, "seconds": value}
    steady = steady_of(lines)
    if steady:
        run.say(
            f"{name:22s} {task['prompt_tokens']:6d} in: {steady.running:4d} running "
            f"{steady.throughput:8.0f} tok/s ({steady.low:.0f} to {steady.high:.0f}, "
            f"{steady.intervals} intervals), "
            f"{value['seconds']:.1f} s in all"
        )
    return {**task, **value, "steady": asdict(steady) if steady else None}


NEW_TOKENS = 200


def cell(tokens: int, requests: int) -> dict[str, Any]:
    """Fill the memory with ``requests`` prompts of ``tokens``, decode NEW_TOKENS each."""
    return {"kind": "steady", "prompt_tokens": tokens, "requests": requests, "new_tokens": NEW_TOKENS}


PREFILL_32K = {"kind": "prefill", "prompt_tokens": 32768, "repeats": 5}


def profile(tokens: int, requests: int, new_tokens: int) -> dict[str, Any]:
    """Where the GPU's time goes."""
    return {"kind": "profile", "prompt_tokens": tokens, "requests": requests, "new_tokens": new_tokens}


def lazy_step(
    tokens: int,
    share: str,
    cells: list[dict[str, Any]],
    limit_s: float,
    shape: Shape = MISTRAL_7B,
    **extra: Any,
) -> Step:
    """The true shape, ``share`` (half, three_quarters) of it lazy, split for ``tokens`` + NEW_TOKENS."""
    on = lazy(getattr(shape, share), shape.sink, shape.recent, tokens + NEW_TOKENS, NEW_TOKENS)
    engine = engine_args(shape.folder(), load_format="dummy", **on, **extra)
    return Step(f"lt_{share}_{tokens // 1024}k", engine, cells, limit_s, vocab=shape.vocab)


def stock_step(
    backend: str, cells: list[dict[str, Any]], limit_s: float, shape: Shape = MISTRAL_7B, **extra: Any
) -> Step:
    """The same without lazy layers, on one of stock SGLang's backends."""
    engine = engine_args(shape.folder(), load_format="dummy", attention_backend=backend, **extra)
    return Step(f"stock_{backend}", engine, cells, limit_s, vocab=shape.vocab)


def run_steady(run: Run) -> None:
    """Stock (flashinfer) and half lazy at 4K to 32K, three quarters lazy at 16K, batch 8, one 32K prompt."""
    stock = [PREFILL_32K, cell(16384, 8), cell(16384, 32), cell(32768, 16), cell(8192, 62), cell(4096, 118)]
    run_cells(
        run,
        [
            stock_step("flashinfer", stock, 260),
            lazy_step(16384, "half", [PREFILL_32K, cell(16384, 8), cell(16384, 56)], 170),
            lazy_step(32768, "half", [cell(32768, 30)], 170),
            lazy_step(8192, "half", [cell(8192, 104)], 170),
            lazy_step(4096, "half", [cell(4096, 180)], 170),
            lazy_step(16384, "three_quarters", [cell(16384, 95)], 190),
        ],
    )


def run_prefill(run: Run) -> None:
    """One 32K prompt, half lazy against stock's backends, and where the GPU's time goes."""
    quick = {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": [1, 8]}
    cells = [PREFILL_32K, profile(32768, 1, 1)]
    run_cells(
        run,
        [
            lazy_step(16384, "half", cells, 110, **quick),
            stock_step("fa3", cells, 110, **quick),
            stock_step("flashinfer", cells, 110, **quick),
        ],
    )


def run_tp(run: Run) -> None:
    """Parity, then QwQ-32B's shape, its own 32 lazy layers and windows, against stock at 16K."""
    run_parity(run)
    run.save()
    quick = {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": [1, 2, 4, *range(8, 72, 8)]}
    quick["shape"] = QWQ_32B
    run_cells(
        run,
        [
            stock_step("flashinfer", [cell(16384, 20)], 200, **quick),
            lazy_step(16384, "half", [cell(16384, 34)], 200, **quick),
        ],
    )


def run_70b(run: Run) -> None:
    """Llama-3-70B's shape under tensor parallelism, half lazy against stock at 16K."""
    quick = {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": [1, 4, 8, 12, 16, 24, 32, 40]}
    quick |= {"shape": LLAMA_70B, "context_length": 40960}
    run_cells(
        run,
        [
            stock_step("flashinfer", [cell(16384, 20)], 200, **quick),
            lazy_step(16384, "half", [cell(16384, 38)], 220, **quick),
        ],
    )


def run_graph(run: Run) -> None:
    """Parity of two engines, to be quick: stock, and lazy layers under CUDA graphs."""
    run_parity(run, ("stock", "graph"))


def run_fp8(run: Run) -> None:
    """Parity with an fp8 KV cache; FlashInfer compiles two kernels for it (minutes on a new machine)."""
    run_parity(run, FP8, limit_s=400)


def run_fa2(run: Run) -> None:
    """Parity as on an A100: FlashInfer's FA2 kernels for everything, also where the GPU has FA3."""
    run_parity(run, FA2)


STEPS = {
    "parity": run_parity,
    "fp8": run_fp8,
    "fa2": run_fa2,
    "steady": run_steady,
    "prefill": run_prefill,
    "tp": run_tp,
    "70b": run_70b,
    "graph": run_graph,
}


def arguments(parser: argparse.ArgumentParser, only: str) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and the engine arguments that it sets for every step."""
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=only)
    parser.add_argument("--budget-s", type=float, default=3600)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument(
        "--mem-fraction", type=float, help="of every engine that fills the memory (a GPU of more than 80 GB)"
    )
    args = parser.parse_args()
    common: dict[str, Any] = {"tp_size": args.tp}
    if args.mem_fraction:
        common["mem_fraction_static"] = args.mem_fraction
    return args, common


def main() -> None:
    args, common = arguments(argparse.ArgumentParser(description=__doc__), "parity,fp8,fa2,steady")
    run = Run(args.folder, args.budget_s, common)
    try:
        for step in args.only.split(","):
            try:
                STEPS[step](run)
            except Exception as error:  # one step must not cost the others their result
                run.say(f"{step}: {type(error).__name__}: {error}")
            run.save()
    finally:
        run.close()
    print("\n" + "\n".join(run.table), flush=True)


if __name__ == "__main__":
    main()
