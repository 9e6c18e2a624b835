"""What lazy layers cost the demo model, on a GPU: pass keys and KL divergence, many configurations at once.

    python -m tests.gpu.quality PROMPTS.json --write [--trials 30] [--lengths 4096 8000] [--kl 16]
                                [--calibration SAMPLES.jsonl [--samples 16] [--sample-tokens 2048]]
    python -m tests.gpu.quality PROMPTS.json --out FOLDER [--model FOLDER] [--configs full,residual-50,...]
                                [--baseline-backend triton] [--together 4] [--config NAME=JSON ...]
                                [--only-texts N]

The first command needs the model's tokenizer and writes prompts as token ids; the second needs the weights
alone. Each configuration is one engine with one batch a task; ``--together`` of them share the GPU. Passkey
and 3-key prompts, keys stated where no window reaches, counted right if the answer begins with the key. KL
divergence against full attention over 64 tokens of running text that follow 4096 (see engine_job.py).
``--lengths`` below 1,400 tokens need ``--recent-tokens``. On a CPU: scripts/run.py, --device cpu --together 1
--pool-tokens 16000; with --only-texts 6, --pool-tokens 64000 --limit-s 900. Results: FOLDER/report.json
(quality_figure.py draws from it), a table on stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lt_sglang.demo.smollm2 import ensure_model
from lt_sglang.eval.divergence import Divergence, divergence
from lt_sglang.eval.intervals import paired_rates, sign_test, wilson
from lt_sglang.eval.items import HfTokenizer
from lt_sglang.eval.tasks.haystack import Prose
from lt_sglang.eval.tasks.passkey import PasskeyTask
from lt_sglang.launch.plan import DEMO_LAZY_LAYERS
from tests.gpu.run import Run, Step, engine_args, hybrid

SINKS = 4
KL_TOKENS, KL_POSITIONS = 4096, 64
# By per cent lazy: lt-sglang calibrate on --calibration's samples, in bfloat16 on a CPU (docs/quality.md).
CALIBRATED = {
    50: "0-4,9-13,16,25,27-29",
    65: "0-5,8-13,16,19,22,25-29",
    75: "0-6,8-13,16,19,21-22,25-29",
}
# The same with --greedy 32 --windows prefill --candidates 8, on a GPU.
GREEDY = {
    50: DEMO_LAZY_LAYERS,
    65: "0-6,8-13,16,19,22,25,27-29",
    75: "0-6,8-13,15-16,19,22,24-25,27-29",
}
# By layers that stay full: --greedy 32, behind the prompt.
GREEDY_AFTER = {4: "0-6,8-16,19-22,24-29", 3: "0-6,8-17,19-22,24-29"}


def dynamic(score: str, keep: float, **more: Any) -> dict[str, Any]:
    """A configuration of dynamic mode."""
    return {"mode": "dynamic", "score": score, "keep": keep, **more}


def after_prompt(layers: str) -> dict[str, Any]:
    """A configuration of dynamic mode with the same list for every prompt."""
    return {"mode": "dynamic", "score": "list", "lazy_layers": layers}


FULL = "full"
CONFIGS: dict[str, dict[str, Any] | None] = {
    FULL: None,
    "residual-50": dynamic("residual-error", 0.5),
    "residual-65": dynamic("residual-error", 0.35),
    "residual-75": dynamic("residual-error", 0.25),
    "error-mass-50": dynamic("error-mass", 0.5),
    "error-mass-65": dynamic("error-mass", 0.35),
    "error-mass-75": dynamic("error-mass", 0.25),
    "lighttransfer-50": dynamic("lighttransfer", 0.5),
    "mass-50": dynamic("discarded-mass", 0.5),
    "mass-65": dynamic("discarded-mass", 0.35),
    "mass-75": dynamic("discarded-mass", 0.25),
    "residual-50-first-chunk": dynamic("residual-error", 0.5, decide="first-chunk"),
    "residual-65-first-chunk": dynamic("residual-error", 0.35, decide="first-chunk"),
    **{f"static-calibrated-{share}": {"lazy_layers": layers} for share, layers in CALIBRATED.items()},
    **{f"list-calibrated-{share}": after_prompt(layers) for share, layers in CALIBRATED.items()},
    **{f"static-greedy-{share}": {"lazy_layers": layers} for share, layers in GREEDY.items()},
    **{f"list-greedy-keep-{keep}": after_prompt(layers) for keep, layers in GREEDY_AFTER.items()},
    **{f"residual-keep-{keep}": dynamic("residual-error", keep) for keep in GREEDY_AFTER},
    "squeeze-50": dynamic("squeeze", 0.5),
    "ends-50": dynamic("ends", 0.5),
    "random-50": dynamic("random", 0.5),
    "pyramid-50": dynamic("pyramid", 0.5),
    "all": {"mode": "dynamic", "score": "all"},
    "full-fp8": None,
    "residual-50-fp8": dynamic("residual-error", 0.5),
    "residual-75-fp8": dynamic("residual-error", 0.25),
}
# Further engine arguments of some of them.
ENGINES = {name: {"kv_cache_dtype": "fp8_e4m3"} for name in CONFIGS if name.endswith("-fp8")}


def write_prompts(
    path: Path,
    lengths: Sequence[int],
    trials: int,
    kl: int,
    recent: int,
    seed: int,
) -> None:
    """Prompts as token ids, with the ids of their answers."""
    tokenizer = HfTokenizer(str(ensure_model()))
    items = [
        item
        for tokens in lengths
        for keys in (1, 3)
        for item in PasskeyTask(tokens, trials, keys, window=recent, seed=seed).items(tokenizer)
    ]
    rng = random.Random(seed)
    kl_tokens = min(KL_TOKENS, max(lengths))
    # One more token than positions: the last position predicts it.
    texts = list(Prose.load(tokenizer, None).passages(kl, kl_tokens + KL_POSITIONS + 1, rng))
    spec = {
        "recent_tokens": recent,
        "keys": [
            {
                "task": item.task,
                "cell": dict(item.cell),
                "prompt": list(item.prompt),
                "answers": [tokenizer.encode(f" {item.answers[0]}"), tokenizer.encode(item.answers[0])],
                "new_tokens": item.new_tokens,
            }
            for item in items
        ],
        "kl": [{"prompt": text[:kl_tokens], "continuation": text[kl_tokens:]} for text in texts],
    }
    path.write_text(json.dumps(spec))
    print(f"{path}: {len(items)} key prompts, {len(texts)} texts of {kl_tokens} tokens")


def write_samples(path: Path, samples: int, tokens: int, recent: int, seed: int) -> None:
    """Questions of the prompts' kind with their answers, half of either task, for lt-sglang calibrate."""
    tokenizer = HfTokenizer(str(ensure_model()))
    # Other keys, places and fillers than any prompt.
    tasks = [PasskeyTask(tokens, samples // 2, keys, recent, seed=seed + 1000) for keys in (1, 3)]
    lines = [
        {"text": f"{tokenizer.decode(list(item.prompt))} {item.answers[0]}."}
        for task in tasks
        for item in task.items(tokenizer)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{path}: {len(lines)} samples of {tokens} tokens")


def step_of(name: str, spec: dict[str, Any], args: argparse.Namespace) -> Step:
    """One configuration: all its prompts, a batch a task."""
    config = CONFIGS[name]
    longest = max(len(one["prompt"]) for one in [*spec["keys"], *spec["kl"]])
    # In one chunk of 8192 a prompt's first chunk would be its last.
    short_chunks = args.device == "cpu" or (config or {}).get("decide") == "first-chunk"
    engine = engine_args(
        Path(args.model),
        max_total_tokens=args.pool_tokens,
        mem_fraction_static=args.memory,
        chunked_prefill_size=2048 if short_chunks else 8192,
        disable_prefill_cuda_graph=True,
        cuda_graph_bs_decode=[1, 2, 4, 8, 16, 24, 32],
    )
    if args.device == "cpu":
        engine |= {"device": "cpu", "sleep_on_idle": True}
    if args.kv_cache_dtype:
        engine["kv_cache_dtype"] = args.kv_cache_dtype
    engine |= ENGINES.get(name, {})
    if config is None:
        engine["attention_backend"] = args.baseline_backend or (
            "torch_native" if args.device == "cpu" else "triton"
        )
    else:
        windows = {"sink": SINKS, "recent": spec["recent_tokens"], "expected": longest, "output": 64}
        engine |= hybrid(**windows, **config)
        if config.get("score") == "all":  # no layer keeps all tokens, so that no number of them is given
            del engine["max_total_tokens"]
            engine["mem_fraction_static"] = 0.1
    tasks: list[dict[str, Any]] = [
        {
            "kind": "answers",
            "prompts": [key["prompt"] for key in spec["keys"]],
            "new_tokens": max((key["new_tokens"] for key in spec["keys"]), default=1),
        },
    ]
    if spec["kl"]:
        tasks.append(
            {
                "kind": "continuations",
                "prompts": [text["prompt"] for text in spec["kl"]],
                "continuations": [text["continuation"] for text in spec["kl"]],
                "top": args.top,
            }
        )
    return Step(name, engine, tasks, args.limit_s)


def found(spec: dict[str, Any], answers: Sequence[dict[str, Any]]) -> list[bool]:
    """Which answers begin with their key."""
    return [
        any(answer["output_ids"][: len(ids)] == ids for ids in key["answers"])
        for key, answer in zip(spec["keys"], answers, strict=True)
    ]


def kl_of(
    spec: dict[str, Any], full: Sequence[dict[str, Any]], light: Sequence[dict[str, Any]]
) -> list[Divergence | None]:
    """One divergence a text; None where a prompt was not cached, since its queries saw everything.

    Raises ValueError if fewer than half were cached.
    """
    found: list[Divergence | None] = []
    for text, p, q in zip(spec["kl"], full, light, strict=True):
        if min(p["cached_tokens"], q["cached_tokens"]) < len(text["prompt"]):
            found.append(None)
            continue
        tops = [[dict(map(tuple, position)) for position in side["tops"]] for side in (p, q)]
        found.append(divergence(*tops))
    cached = sum(one is not None for one in found)
    if 2 * cached < len(found):
        raise ValueError(f"{cached} of {len(found)} texts were cached")
    return found


def summarise(run: Run, spec: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[str]:
    """Write the report of the engines so far, and return its table."""
    table = []
    hits = {name: found(spec, result["tasks"][0]) for name, result in results.items()}
    cells = [(key["task"], key["cell"]["tokens"]) for key in spec["keys"]]
    full_tasks = results[FULL]["tasks"] if FULL in results else None
    for name, result in results.items():
        report: dict[str, Any] = {
            "config": CONFIGS[name],
            "start_seconds": result["start_seconds"],
            "lighttransfer": result.get("lighttransfer"),
            "trials": [
                {**key["cell"], "task": key["task"], "found": hit, **answer}
                for key, hit, answer in zip(spec["keys"], hits[name], result["tasks"][0], strict=True)
            ],
            "cells": {},
        }
        line = [f"{name:26s}"]
        for cell in [*dict.fromkeys(cells), None]:
            picked = [index for index, other in enumerate(cells) if cell in (None, other)]
            mine = [hits[name][index] for index in picked]
            if not mine:
                continue
            interval = wilson(sum(mine), len(mine))
            entry: dict[str, Any] = {
                "found": sum(mine),
                "of": len(mine),
                "interval": [interval.low, interval.high],
            }
            if FULL in hits:
                base = [hits[FULL][index] for index in picked]
                difference = paired_rates(base, mine)
                entry |= {
                    "ratio_to_full": sum(mine) / sum(base) if sum(base) else None,
                    "difference_interval": [difference.low, difference.high],
                    "sign_test_p": sign_test(base, mine),
                }
            label = f"{cell[0]} {cell[1]}" if cell else "all"
            report["cells"][label] = entry
            ratio = entry.get("ratio_to_full")
            line.append(f"{label} {sum(mine)}/{len(mine)}" + (f" ({ratio:.3f})" if ratio is not None else ""))
        tasks = result["tasks"]
        if full_tasks is not None and len(full_tasks) > 1 and len(tasks) > 1 and name != FULL:
            try:
                texts = kl_of(spec, full_tasks[1], tasks[1])
            except ValueError as error:
                table.append(f"{name}: no KL divergence: {error}")
            else:
                counted = [text for text in texts if text is not None]
                means = [text.mean for text in counted]
                report["kl"] = {
                    "counted": len(counted),
                    "of": len(texts),
                    "mean": statistics.fmean(means),
                    "median": statistics.median(means),
                    "largest": max(text.largest for text in counted),
                    "seen": statistics.fmean(text.seen for text in counted),
                    "texts": [text.mean if text is not None else None for text in texts],
                    "decisions": [out["decision"] for out in tasks[1]],
                }
                told = f"seen {report['kl']['seen']:.4f}, {len(counted)} of {len(texts)} texts"
                line.append(f"KL {report['kl']['mean']:.5f} ({told})")
        run.report[name] = report
        table.append("  ".join(line))
    run.save()
    return table


def main() -> None:
    """Write prompts, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--write", action="store_true", help="write the prompts; then nothing is measured")
    parser.add_argument("--calibration", type=Path, help="with --write: samples for lt-sglang calibrate")
    parser.add_argument("--samples", type=int, default=16, help="of --calibration")
    parser.add_argument("--sample-tokens", type=int, help="their length; default twice --recent-tokens")
    parser.add_argument("--trials", type=int, default=30, help="a length and task")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8000])
    parser.add_argument("--kl", type=int, default=16, help="texts")
    parser.add_argument("--recent-tokens", type=int, default=1020)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only-texts", type=int, metavar="N", help="no keys; divergence on N of the texts")
    parser.add_argument("--model", help="folder of the model; the demo model by default")
    parser.add_argument("--configs", default=",".join(CONFIGS), help=", ".join(CONFIGS))
    parser.add_argument(
        "--config", action="append", default=[], metavar="NAME=JSON", help="one more, and measure it"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--baseline-backend", help="of full attention; triton, on a CPU torch_native")
    parser.add_argument("--kv-cache-dtype", help="of every engine, e.g. fp8_e4m3")
    parser.add_argument("--together", type=int, default=4, help="engines at a time")
    parser.add_argument(
        "--pool-tokens",
        type=int,
        default=400000,
        help="of each engine; its streaming pool must hold the windows of all texts, or some are not cached",
    )
    parser.add_argument("--memory", type=float, default=0.5, help="mem_fraction_static of each engine")
    parser.add_argument("--top", type=int, default=512, help="log-probabilities a position")
    parser.add_argument("--limit-s", type=float, default=240)
    parser.add_argument("--budget-s", type=float, default=3600)
    args = parser.parse_args()
    if args.write:
        recent, seed = args.recent_tokens, args.seed
        write_prompts(args.prompts, args.lengths, args.trials, args.kl, recent, seed)
        if args.calibration is not None:
            write_samples(args.calibration, args.samples, args.sample_tokens or 2 * recent + 8, recent, seed)
        return
    names = args.configs.split(",") if args.configs else []
    for text in args.config:
        name, _, value = text.partition("=")
        CONFIGS[name] = json.loads(value)
        names.append(name)
    unknown = [name for name in names if name not in CONFIGS]
    if unknown or args.out is None:
        parser.error(f"--configs: {unknown[0]!r} is not one of {', '.join(CONFIGS)}" if unknown else "--out")
    args.model = args.model or ensure_model()
    spec = json.loads(args.prompts.read_text())
    if args.only_texts is not None:
        spec |= {"keys": [], "kl": spec["kl"][: args.only_texts]}
    run = Run(args.out, args.budget_s)
    steps = [step_of(name, spec, args) for name in dict.fromkeys(names)]
    results: dict[str, dict[str, Any]] = {}
    table: list[str] = []
    try:
        for start in range(0, len(steps), args.together):
            # The next ones import SGLang meanwhile.
            run.launch(steps[start : start + 2 * args.together])
            for step, result in run.jobs_together(steps[start : start + args.together]):
                if result and len(result["tasks"]) == len(step.tasks):
                    results[step.name] = result
                else:
                    run.say(f"{step.name}: FAILED, see {run.folder / f'{step.name}.log'}")
            # Whatever ends this run, the engines so far are in the report.
            table = summarise(run, spec, results)
    finally:
        run.close()
    print("\n" + "\n".join([*run.table, *table]), flush=True)


if __name__ == "__main__":
    main()
