"""Parity on a GPU: SGLang in bfloat16 with lazy layers against transformers in float32.

    python -m tests.gpu.parity OUT_FOLDER [--only static,fa2,fp8,dynamic] [--tp 2] [--budget-s 3600]

The bound is not chosen but measured in the same run: the same engine without lazy layers (stock SGLang, its
flashinfer backend) against the same float32 model with full attention gives the noise of bfloat16. The error
with lazy layers may be 1.25 times that (mean) and 1.5 times (largest of all tokens).

static: a list of layers. fa2: FlashInfer's FA2 kernels for everything, as on an A100. fp8: an fp8 KV cache
(FlashInfer compiles two kernels for it, minutes on a new machine). dynamic: every request has layers of its
own; outputs are held to the reference of the layers that the engine chose, and the choices to float32's.

OUT_FOLDER/report.json is a result file; each engine's log lies beside it. Exits with 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loadtest.experiments.offline import Run, Step, engine_args, hybrid
from tests.gpu import reference as ref
from tests.gpu.reference import Reference

LAZY = (1, 2, 4)
MEAN_BOUND, MAX_BOUND = 1.25, 1.5
# A wrong mask must be off by more than so many times the noise; dynamic mode's is right in prompts.
CONTROL, DYNAMIC_CONTROL = 4, 3
COMMON: dict[str, Any] = {"chunked_prefill_size": 1024, "mem_fraction_static": 0.25}
QUICK: dict[str, Any] = {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": [1, 2, 4, 8, 12]}
FP8 = {**QUICK, "kv_cache_dtype": "fp8_e4m3"}
FORCE_FA2 = {"LT_FORCE_FA2": "1"}
STATIC: dict[str, Any] = {"lazy_layers": ",".join(map(str, LAZY))}
DYNAMIC = {"mode": "dynamic", "keep": ref.KEEP, "score": "lighttransfer", "check_tables": True}
SCORE = {"kind": "score", "prompts": ref.prompts(), "new_tokens": ref.NEW_TOKENS}
HITS = {"kind": "continuations", "prompts": ref.prompts(), "continuations": ref.continuations(), "top": 0}
COPIES = {**SCORE, "kind": "copies", "copies": 4}


@dataclass(frozen=True)
class Kind:
    """One engine of a part.

    config: keys of lazy layers; None: stock. graph: with CUDA graphs and a pool so small that slots are
    reused all the time (about twice the longest request), which keeps no prefix. bounds: the stock engines
    whose error bounds its own. limit_s: of the engine.
    """

    config: dict[str, Any] | None = None
    graph: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    bounds: tuple[str, ...] = ()
    limit_s: float = 200.0

    @property
    def dynamic(self) -> bool:
        """Whether every request has layers of its own."""
        return self.config is not None and "mode" in self.config

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """Scored prompts, then what its pool has room for."""
        if not self.graph:
            return [SCORE, HITS]
        return [SCORE, SCORE, COPIES] if self.dynamic else [SCORE, SCORE]


# Stock SGLang's prefill reads fp8 keys of earlier chunks only, unless it is told to write them first
# ("paged"); lazy layers always read what they wrote.
PARTS: dict[str, dict[str, Kind]] = {
    "static": {
        "stock": Kind(),
        "graph": Kind(STATIC, graph=True, bounds=("stock",)),
        "eager": Kind(STATIC, engine={"disable_cuda_graph": True}, bounds=("stock",)),
    },
    "fp8": {
        "fp8_stock": Kind(engine=FP8, limit_s=400),
        "fp8_stock_paged": Kind(engine=FP8, env={"SGLANG_FLASHINFER_USE_PAGED": "1"}, limit_s=400),
        "fp8": Kind(STATIC, True, FP8, bounds=("fp8_stock", "fp8_stock_paged"), limit_s=400),
    },
    "fa2": {
        "fa2_stock": Kind(engine=QUICK, env=FORCE_FA2),
        "fa2_graph": Kind(STATIC, True, QUICK, FORCE_FA2, bounds=("fa2_stock",)),
        "fa2_eager": Kind(STATIC, False, {"disable_cuda_graph": True}, FORCE_FA2, ("fa2_stock",)),
    },
    "dynamic": {
        "dynamic_stock": Kind(engine=QUICK),
        "dynamic_graph": Kind(DYNAMIC, True, QUICK, bounds=("dynamic_stock",)),
        "dynamic_eager": Kind(
            DYNAMIC, engine={**QUICK, "disable_cuda_graph": True}, bounds=("dynamic_stock",)
        ),
    },
}


def step_of(name: str, kind: Kind, model: Path, more: dict[str, Any]) -> Step:
    """The engine ``name``. more: keyword arguments of all engines."""
    engine = engine_args(model, **COMMON, **kind.engine, **more)
    engine["max_total_tokens"] = 12000 if kind.graph else 40000
    if kind.config is None:
        engine.setdefault("attention_backend", "flashinfer")
    else:
        engine |= hybrid(ref.SINK, ref.RECENT, **kind.config)
    return Step(name, engine, kind.tasks, kind.limit_s, env={"LT_WATCH": "1", **kind.env})


def judge(name: str, kind: Kind, tasks: list[Any], reference: Reference) -> dict[str, Any]:
    """By label, what one engine's tasks say."""
    lazy = ref.decided if kind.dynamic else ref.fixed(LAZY if kind.config else ())
    found = {name: ref.errors(tasks[0], reference, lazy)}
    if kind.dynamic:
        found[name] |= ref.choices(tasks[0], reference)
    if not kind.graph:
        found[f"{name}_hits"] = ref.hit_errors(tasks[1], reference, lazy)
        return found
    found[f"{name}_again"] = ref.errors(tasks[1], reference, lazy)
    if kind.dynamic:
        found[f"{name}_copies"] = ref.compare_copies(tasks[2])
    wrong = ref.others if kind.dynamic else ref.fixed(())
    found[f"{name}_control"] = ref.errors(tasks[0], reference, wrong)
    return found


def verdicts(found: dict[str, Any], kinds: dict[str, Kind]) -> dict[str, bool]:
    """What must hold of the errors ``found``, and whether it does."""
    held: dict[str, bool] = {}

    def bound(label: str, noise: str) -> None:
        ours, theirs = (found.get(one, {}) for one in (label, noise))
        held[f"{label} within the noise of {noise}"] = (
            "mean" in ours
            and "mean" in theirs
            and ours["mean"] <= MEAN_BOUND * theirs["mean"]
            and ours["max"] <= MAX_BOUND * theirs["max"]
        )

    for name, kind in kinds.items():
        for noise in kind.bounds:
            bound(name, noise)
            if kind.graph:
                bound(f"{name}_again", noise)
            else:
                bound(f"{name}_hits", f"{noise}_hits")
        if f"{name}_control" in found and kind.bounds:
            control, noise = found[f"{name}_control"], found.get(kind.bounds[0], {"mean": float("inf")})
            times = DYNAMIC_CONTROL if kind.dynamic else CONTROL
            held[f"{name}: a wrong mask is seen"] = control["mean"] > times * noise["mean"]
        if "choices_wrong" in found.get(name, {}):
            held[f"{name}: layers as in float32"] = not found[name]["choices_wrong"]
        copies = found.get(f"{name}_copies")
        if copies:
            held[f"{name}: copies have the layers of one"] = copies["layers_equal"] == copies["of"]
    return held


def run_part(run: Run, part: str, model: Path, device: str, more: dict[str, Any]) -> bool:
    """Run a part's engines side by side, judge them, add both to the report; whether all held."""
    kinds = PARTS[part]
    results = run.together([step_of(name, kind, model, more) for name, kind in kinds.items()])
    reference = Reference(model, device)
    found: dict[str, Any] = {}
    for name, result in results.items():
        found |= judge(name, kinds[name], result["tasks"], reference)
    del reference
    if device == "cuda":
        torch.cuda.empty_cache()
    held = verdicts(found, kinds)
    graph, eager = (
        next((results[name]["tasks"][0] for name in results if name.endswith(kind)), [])
        for kind in ("graph", "eager")
    )
    if graph and eager:
        pairs = list(zip(graph, eager, strict=True))
        found["graph_equals_eager"] = {
            "outputs": sum(a["output_ids"] == b["output_ids"] for a, b in pairs),
            "choices": sum(_layers(a) == _layers(b) for a, b in pairs),
            "of": len(pairs),
        }
    for name in results:
        log = (run.folder / f"{name}.log").read_text(errors="replace")
        ran = [line.split()[-1] for line in log.splitlines() if "RAGGED PREFILL " in line]
        found[name]["prefill_kernels"] = ran
        if part == "fa2":
            held[f"{name}: FA2 ran"] = ran == ["fa2"]
    run.report[part] = {"errors": found, "held": held}
    for label, value in found.items():
        told = (
            f"{key} {one:.4g}" if isinstance(one, float) else f"{key} {one}" for key, one in value.items()
        )
        run.say(f"{part} {label:24s} {'  '.join(told)}")
    for label, good in held.items():
        run.say(f"{part} {label}: {'PASS' if good else 'FAIL'}")
    run.save()
    return all(held.values()) and len(results) == len(kinds)


def _layers(out: dict[str, Any]) -> list[int] | None:
    return (out["decision"] or {}).get("lazy_layers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), help="some of them, separated by commas")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=3600)
    args = parser.parse_args()
    what = "log-probabilities against the same model in float32"
    run = Run(args.folder, args.budget_s, "parity", what)
    model = ref.make_model(run.folder / "model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    good = True
    try:
        for part in args.only.split(","):
            good &= run_part(run, part, model, device, {"tp_size": args.tp})
    finally:
        run.save()
        run.close()
    print("\n" + "\n".join(run.table), flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
