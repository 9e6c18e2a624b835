"""Everything this project claims about a GPU, in one command.

    python tests/gpu/run.py OUT_FOLDER [--only parity,steady,...] [--budget-s 540]

Each step is one engine process with a time limit; a step that would not fit what is left of the budget is
skipped and said so. A table comes last. Files in OUT_FOLDER: report.json, and per step its log.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu import parity
from tests.gpu.jobs import Job, steady_of, task_logs

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HALF, THREE_QUARTERS = "8-23", "4-27"


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
    config = {
        "lazy_layers": layers,
        "sink_tokens": sink,
        "recent_tokens": recent,
        "expected_tokens": expected,
        "expected_output_tokens": output,
    }
    return {
        "attention_backend": "lighttransfer",
        "json_model_override_args": json.dumps({"lighttransfer": config}),
    }


@dataclass(frozen=True)
class Step:
    """One engine: its name, keyword arguments, tasks and time limit in seconds."""

    name: str
    engine: dict[str, Any]
    tasks: list[dict[str, Any]]
    limit_s: float
    vocab: int = 512

    @property
    def spec(self) -> dict[str, Any]:
        """What engine_job.py reads."""
        return {"engine": self.engine, "tasks": self.tasks, "vocab": self.vocab}


class Run:
    """One run: its folder, its clock, its report."""

    def __init__(self, folder: Path, budget_s: float) -> None:
        self.folder = folder
        self.deadline = time.monotonic() + budget_s
        self.report: dict[str, Any] = {}
        self.table: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def jobs(self, steps: list[Step]) -> Iterator[tuple[Step, dict[str, Any] | None]]:
        """Run the steps one after the other, each within its limit and what is left of the budget."""
        waiting = Job(steps[0].name, steps[0].spec, self.folder)
        for index, step in enumerate(steps):
            job, left = waiting, self.deadline - time.monotonic()
            if index + 1 < len(steps):
                waiting = Job(steps[index + 1].name, steps[index + 1].spec, self.folder)
            if left < min(45.0, step.limit_s):
                job.stop()
                self.say(f"{step.name}: skipped, {left:.0f} s left of the budget")
                yield step, None
            else:
                yield step, job.run(min(step.limit_s, left))

    def jobs_together(self, steps: list[Step]) -> list[tuple[Step, dict[str, Any] | None]]:
        """Run small engines side by side; for results, not for times."""
        waiting = [Job(step.name, step.spec, self.folder) for step in steps]
        limit = min(max(step.limit_s for step in steps), self.deadline - time.monotonic())
        with ThreadPoolExecutor(len(steps)) as pool:
            return list(zip(steps, pool.map(lambda job: job.run(max(limit, 1)), waiting), strict=True))

    def say(self, line: str) -> None:
        """Add a line to the table."""
        self.table.append(line)
        print(line, flush=True)

    def save(self) -> None:
        """Write the report."""
        (self.folder / "report.json").write_text(json.dumps(self.report, indent=1))


def run_parity(run: Run, fp8: bool = False) -> None:
    """Log-probabilities against float32: graphs on and off, slots reused, prefixes hit; or fp8 KV."""
    model = parity.make_model(Path("/tmp/lt-parity-model"))
    lazy_text = ",".join(map(str, parity.LAZY))
    score = [{"kind": "score", "prompts": parity.prompts(), "new_tokens": parity.NEW_TOKENS}]
    common = {"chunked_prefill_size": 1024, "mem_fraction_static": 0.3, "max_total_tokens": 40000}
    on = lazy(lazy_text, parity.SINK, parity.RECENT, 2048, parity.NEW_TOKENS)
    # Churn: about twice the longest request, so slots are reused all the time; then the same prompts again.
    small = {**common, "max_total_tokens": 12000}
    if fp8:
        common["kv_cache_dtype"] = "fp8_e4m3"
        variants = {
            "fp8_stock": engine_args(model, **common, attention_backend="flashinfer"),
            "fp8": engine_args(model, **common, **on),
        }
    else:
        variants = {
            "stock": engine_args(model, **common, attention_backend="flashinfer"),
            "graph": engine_args(model, **small, **on),
            "eager": engine_args(model, **common, **on, disable_cuda_graph=True),
        }
    outs = {}
    steps = [
        Step(name, engine, score * (2 if name == "graph" else 1), 150) for name, engine in variants.items()
    ]
    for step, result in run.jobs_together(steps) if fp8 else run.jobs(steps):
        if result and result["tasks"]:
            outs[step.name] = result
    reference = parity.Reference(model, "cuda")
    found: dict[str, Any] = {}
    for name, result in outs.items():
        layers = () if "stock" in name else parity.LAZY
        for index, scored in enumerate(result["tasks"]):
            label = name if index == 0 else f"{name}_again"
            found[label] = parity.errors(scored, reference, layers)
            found[label]["cached"] = sum(out["cached_tokens"] for out in scored)
    if "graph" in outs:
        found["full_mask_control"] = parity.errors(outs["graph"]["tasks"][0], reference, ())
    run.report.setdefault("parity", {}).update(found)
    for label, error in found.items():
        run.say(f"parity {label:18s} " + "  ".join(f"{k} {v:.4g}" for k, v in error.items()))
    for label, noise in (
        ("graph", "stock"),
        ("graph_again", "stock"),
        ("eager", "stock"),
        ("fp8", "fp8_stock"),
    ):
        if label in found and noise in found:
            good = (
                found[label]["mean"] <= 1.25 * found[noise]["mean"]
                and found[label]["max"] <= 1.5 * found[noise]["max"]
            )
            run.say(f"parity {label} within the noise of {noise}: {'PASS' if good else 'FAIL'}")
    if "graph" in outs and "eager" in outs:
        pairs = zip(outs["graph"]["tasks"][0], outs["eager"]["tasks"][0], strict=True)
        same = [a["output_ids"] == b["output_ids"] for a, b in pairs]
        run.report["parity"]["graph_equals_eager"] = same
        run.say(f"parity graph and eager: {sum(same)} of {len(same)} greedy outputs equal")


def mistral(folder: Path) -> Path:
    """The Mistral-7B shape; weights are dummies."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MISTRAL))
    return folder


def run_cells(run: Run, steps: list[Step]) -> None:
    """Steady decode and prefill times of each step's cells into the report."""
    for step, result in run.jobs(steps):
        if result is None:
            continue
        logs = task_logs((run.folder / f"{step.name}.log").read_text())
        entry: dict[str, Any] = {"start_seconds": result["start_seconds"], "engine": step.engine, "cells": []}
        for task, value, lines in zip(step.tasks, result["tasks"], logs, strict=False):
            entry["cells"].append(_cell_result(run, step.name, task, value, lines))
        entry["lighttransfer"] = result.get("lighttransfer")
        entry["memory_usage"] = result.get("memory_usage")
        run.report.setdefault("steady", {})[step.name] = entry
        run.save()


def _cell_result(run: Run, name: str, task: dict[str, Any], value: Any, lines: list[str]) -> dict[str, Any]:
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


PREFILL_32K = {"kind": "prefill", "prompt_tokens": 32768, "repeats": 3}


def lazy_step(tokens: int, layers: str, cells: list[dict[str, Any]], limit_s: float, **extra: Any) -> Step:
    """The true shape with ``layers`` lazy, split for requests of ``tokens`` + NEW_TOKENS."""
    model = mistral(Path("/tmp/lt-mistral"))
    share = {HALF: "half", THREE_QUARTERS: "three_quarters"}[layers]
    on = lazy(layers, 4, 1020, tokens + NEW_TOKENS, NEW_TOKENS)
    engine = engine_args(model, load_format="dummy", **on, **extra)
    return Step(f"lt_{share}_{tokens // 1024}k", engine, cells, limit_s, vocab=32000)


def stock_step(backend: str, cells: list[dict[str, Any]], limit_s: float, **extra: Any) -> Step:
    """The same without lazy layers, on one of stock SGLang's backends."""
    engine = engine_args(
        mistral(Path("/tmp/lt-mistral")), load_format="dummy", attention_backend=backend, **extra
    )
    return Step(f"stock_{backend}", engine, cells, limit_s, vocab=32000)


def run_steady(run: Run) -> None:
    """Stock (flashinfer) and half lazy at 4K to 32K, three quarters lazy at 16K, batch 8, one 32K prompt."""
    stock = [PREFILL_32K, cell(16384, 8), cell(16384, 32), cell(32768, 16), cell(8192, 62), cell(4096, 118)]
    run_cells(
        run,
        [
            stock_step("flashinfer", stock, 260),
            lazy_step(16384, HALF, [PREFILL_32K, cell(16384, 8), cell(16384, 56)], 170),
            lazy_step(32768, HALF, [cell(32768, 30)], 170),
            lazy_step(8192, HALF, [cell(8192, 104)], 170),
            lazy_step(4096, HALF, [cell(4096, 180)], 170),
            lazy_step(16384, THREE_QUARTERS, [cell(16384, 95)], 190),
        ],
    )


def run_rest(run: Run) -> None:
    """The decode cells of ``steady`` with as little else as possible, where GPU time is short."""
    quick = {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": [1, 8, 48, 88, 152]}
    run_cells(
        run,
        [
            lazy_step(8192, HALF, [cell(8192, 88)], 120, **quick),
            lazy_step(16384, THREE_QUARTERS, [cell(16384, 83)], 140, **quick),
            lazy_step(4096, HALF, [cell(4096, 152)], 120, **quick),
        ],
    )
    run_fp8(run)
    run_cells(run, [lazy_step(16384, HALF, [cell(16384, 48)], 120, **quick)])


def run_backends(run: Run) -> None:
    """Stock SGLang's other backends at 16K, to know which is the best baseline."""
    cells = [PREFILL_32K, cell(16384, 8), cell(16384, 32)]
    run_cells(run, [stock_step(backend, cells, 170) for backend in ("fa3", "triton")])


def run_fp8(run: Run) -> None:
    """Parity with an fp8 KV cache; FlashInfer compiles two kernels for it (minutes on a new machine)."""
    run_parity(run, fp8=True)


STEPS = {
    "parity": run_parity,
    "fp8": run_fp8,
    "steady": run_steady,
    "backends": run_backends,
    "rest": run_rest,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="parity,fp8,steady,backends")
    parser.add_argument("--budget-s", type=float, default=3600)
    args = parser.parse_args()
    run = Run(args.folder, args.budget_s)
    for step in args.only.split(","):
        try:
            STEPS[step](run)
        except Exception as error:  # one step must not cost the others their result
            run.say(f"{step}: {type(error).__name__}: {error}")
        run.save()
    print("\n" + "\n".join(run.table), flush=True)


if __name__ == "__main__":
    main()
