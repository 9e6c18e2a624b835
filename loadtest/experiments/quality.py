"""What lazy layers cost the demo model, on a GPU: pass keys and KL divergence, many configurations at once.

    python -m loadtest.experiments.quality PROMPTS.json --write [--trials 30] [--lengths 4096 8000] [--kl 16]
                                [--recent-tokens 1020] [--keys-outside 2044]
                                [--calibration SAMPLES.jsonl [--samples 16] [--sample-tokens 2048]]
    python -m loadtest.experiments.quality PROMPTS.json --out FOLDER [--configs full,residual-50,...]
                                [--baseline-backend triton] [--together 4] [--config NAME=JSON ...]
                                [--only-texts N]

The first command needs the model's tokenizer and writes prompts as token ids; the second needs the weights
alone. Each configuration (quality.yaml) is one engine with one batch a task; ``--together`` of them share the
GPU. Passkey and 3-key prompts, counted right if the answer begins with the key. ``--recent-tokens`` is the
window of every configuration without one of its own. Keys stand before it, or before the last tokens that
``--keys-outside`` counts, which configurations with a longer window need. KL divergence against full
attention over 64 tokens of running text that follow 4096 (engine_job.py). ``--lengths`` below 1,400 tokens
need ``--recent-tokens``. On a CPU: scripts/run.py, --device cpu --together 1 --pool-tokens 16000; with
--only-texts 6, --pool-tokens 64000 --limit-s 900. Results: FOLDER/report.json (quality_results.py makes a
result file of it), a table on stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from loadtest.experiments.offline import Run, Step, engine_args, hybrid
from lt_sglang.config import parse_layers
from lt_sglang.demo.smollm2 import ensure_model
from lt_sglang.eval.divergence import Divergence, divergence
from lt_sglang.eval.intervals import paired_rates, sign_test, wilson
from lt_sglang.eval.items import HfTokenizer
from lt_sglang.eval.tasks.haystack import Prose
from lt_sglang.eval.tasks.passkey import PasskeyTask

SINKS = 4
KL_TOKENS, KL_POSITIONS = 4096, 64
FULL = "full"
MODEL = "SmolLM2-135M-Instruct, bfloat16"
CONFIGS: dict[str, dict[str, Any] | None] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)

# By the layers that stay full, of the model's 30: lists that are cut after the prompt.
LISTS = {
    keep: parse_layers((CONFIGS[name] or {})["lazy_layers"])
    for keep, name in {15: "list-calibrated-50", 8: "list-calibrated-75", 4: "list-greedy-keep-4"}.items()
}


def key_questions(
    tokenizer: HfTokenizer, lengths: Sequence[int], trials: int, recent: int, seed: int
) -> list[dict[str, Any]]:
    """Passkey and 3-key prompts of each length as token ids, with the ids of their answers."""
    return [
        {
            "task": item.task,
            "cell": dict(item.cell),
            "prompt": list(item.prompt),
            "answers": [tokenizer.encode(f" {item.answers[0]}"), tokenizer.encode(item.answers[0])],
            "new_tokens": item.new_tokens,
        }
        for tokens in lengths
        for keys in (1, 3)
        for item in PasskeyTask(tokens, trials, keys, window=recent, seed=seed).items(tokenizer)
    ]


def write_prompts(
    path: Path, lengths: Sequence[int], trials: int, kl: int, recent: int, outside: int, seed: int
) -> None:
    """Prompts as token ids, with the ids of their answers, whose keys stand before the last ``outside``."""
    tokenizer = HfTokenizer(str(ensure_model()))
    keys = key_questions(tokenizer, lengths, trials, outside, seed)
    rng = random.Random(seed)
    kl_tokens = min(KL_TOKENS, max(lengths))
    # One more token than positions: the last position predicts it.
    texts = list(Prose.load(tokenizer, None).passages(kl, kl_tokens + KL_POSITIONS + 1, rng))
    spec = {
        "recent_tokens": recent,
        "keys_outside": outside,
        "keys": keys,
        "kl": [{"prompt": text[:kl_tokens], "continuation": text[kl_tokens:]} for text in texts],
    }
    path.write_text(json.dumps(spec))
    print(f"{path}: {len(keys)} key prompts, {len(texts)} texts of {kl_tokens} tokens")


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


def reaches_keys(name: str, spec: dict[str, Any]) -> bool:
    """Whether a window of this configuration can hold a key, so that its answers would say nothing."""
    recent = (CONFIGS[name] or {}).get("recent_tokens", spec["recent_tokens"])
    return bool(spec["keys"]) and recent > spec.get("keys_outside", spec["recent_tokens"])


def step_of(name: str, spec: dict[str, Any], args: argparse.Namespace) -> Step:
    """One configuration: all its prompts, a batch a task."""
    config = CONFIGS[name]
    on_cpu = args.device == "cpu"
    # In one chunk of 8192 a prompt's first chunk would be its last.
    short_chunks = on_cpu or (config or {}).get("decide") == "first-chunk"
    engine = engine_args(
        Path(args.model),
        max_total_tokens=args.pool_tokens,
        mem_fraction_static=args.memory,
        chunked_prefill_size=2048 if short_chunks else 8192,
        disable_prefill_cuda_graph=True,
        cuda_graph_bs_decode=[1, 2, 4, 8, 16, 24, 32],
        **({"device": "cpu", "sleep_on_idle": True} if on_cpu else {}),
    )
    if dtype := "fp8_e4m3" if name.endswith("-fp8") else args.kv_cache_dtype:
        engine["kv_cache_dtype"] = dtype
    if config is None:
        engine["attention_backend"] = args.baseline_backend or ("torch_native" if on_cpu else "triton")
    else:
        engine |= hybrid(SINKS, spec["recent_tokens"], **config)
        if config.get("lazy_layers") == "all":  # no layer keeps all, so no number of tokens is given
            del engine["max_total_tokens"]
            engine["mem_fraction_static"] = 0.1
    new_tokens = max((key["new_tokens"] for key in spec["keys"]), default=1)
    prompts = [key["prompt"] for key in spec["keys"]]
    tasks: list[dict[str, Any]] = [{"kind": "answers", "prompts": prompts, "new_tokens": new_tokens}]
    if spec["kl"]:
        prompts, continuations = ([text[part] for text in spec["kl"]] for part in ("prompt", "continuation"))
        texts = {"prompts": prompts, "continuations": continuations, "top": args.top}
        tasks.append({"kind": "continuations", **texts})
    return Step(name, engine, tasks, args.limit_s)


def found(spec: dict[str, Any], answers: Sequence[dict[str, Any]]) -> list[bool]:
    """Which answers begin with their key."""
    return [
        any(answer["output_ids"][: len(ids)] == ids for ids in key["answers"])
        for key, answer in zip(spec["keys"], answers, strict=True)
    ]


def counted(mine: Sequence[bool], full: Sequence[bool] | None) -> dict[str, Any]:
    """Right answers, and what they are beside full attention's, paired by question."""
    interval = wilson(sum(mine), len(mine))
    entry = {"found": sum(mine), "of": len(mine), "interval": [interval.low, interval.high]}
    if full is None:
        return entry
    difference = paired_rates(full, mine)
    return {
        **entry,
        "ratio_to_full": sum(mine) / sum(full) if sum(full) else None,
        "difference_interval": [difference.low, difference.high],
        "sign_test_p": sign_test(full, mine),
    }


def by_cell(keys: Sequence[dict[str, Any]], hits: Sequence[bool]) -> dict[str, int]:
    """Right answers of each task and length."""
    cells: dict[str, int] = {}
    for key, hit in zip(keys, hits, strict=True):
        cell = f"{key['task']} {key['cell']['tokens']}"
        cells[cell] = cells.get(cell, 0) + hit
    return cells


def kl_of(
    spec: dict[str, Any], full: Sequence[dict[str, Any]], light: Sequence[dict[str, Any]]
) -> list[Divergence | None]:
    """One divergence a text; None where a prompt was not cached, since its queries saw everything.

    Raises:
        ValueError: fewer than half were cached.
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


def kl_entry(texts: Sequence[Divergence | None], outs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The divergences of one configuration's texts."""
    known = [text for text in texts if text is not None]
    means = [text.mean for text in known]
    return {
        "counted": len(known),
        "of": len(texts),
        "mean": statistics.fmean(means),
        "median": statistics.median(means),
        "largest": max(text.largest for text in known),
        "seen": statistics.fmean(text.seen for text in known),
        "texts": [text.mean if text is not None else None for text in texts],
        "decisions": [out["decision"] for out in outs],
    }


def summarise(run: Run, spec: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[str]:
    """Write the report of the engines so far, and return its table."""
    table = []
    hits = {name: found(spec, result["tasks"][0]) for name, result in results.items()}
    labels = [f"{key['task']} {key['cell']['tokens']}" for key in spec["keys"]]
    full = results.get(FULL)
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
        for label in [*dict.fromkeys(labels), "all"] if labels else []:
            picked = [index for index, other in enumerate(labels) if label in ("all", other)]
            mine = [hits[name][index] for index in picked]
            base = [hits[FULL][index] for index in picked] if full else None
            entry = report["cells"][label] = counted(mine, base)
            ratio = entry.get("ratio_to_full")
            line.append(f"{label} {sum(mine)}/{len(mine)}" + (f" ({ratio:.3f})" if ratio is not None else ""))
        if full is not None and spec["kl"] and name != FULL:
            try:
                texts = kl_of(spec, full["tasks"][1], result["tasks"][1])
            except ValueError as error:
                table.append(f"{name}: no KL divergence: {error}")
            else:
                kl = report["kl"] = kl_entry(texts, result["tasks"][1])
                told = f"seen {kl['seen']:.4f}, {kl['counted']} of {kl['of']} texts"
                line.append(f"KL {kl['mean']:.5f} ({told})")
        run.report.setdefault("configurations", {})[name] = report
        table.append("  ".join(line))
    run.save()
    return table


def main() -> None:
    """Write prompts, or measure."""
    args = _arguments()
    if args.write:
        recent, seed = args.recent_tokens, args.seed
        outside = args.keys_outside or recent
        write_prompts(args.prompts, args.lengths, args.trials, args.kl, recent, outside, seed)
        if args.calibration is not None:
            write_samples(args.calibration, args.samples, args.sample_tokens or 2 * recent + 8, recent, seed)
        return
    spec = json.loads(args.prompts.read_text())
    if args.only_texts is not None:
        spec |= {"keys": [], "kl": spec["kl"][: args.only_texts]}
    run = Run(args.out, args.budget_s, "quality", "pass keys, and KL divergence along running text")
    run.report["workload"]["model"] = f"{MODEL}, {SINKS} + {spec['recent_tokens']}"
    steps = []
    for name in dict.fromkeys(args.configs):
        if reaches_keys(name, spec):
            run.say(f"{name}: left out, its window reaches the keys; write prompts with --keys-outside")
        else:
            steps.append(step_of(name, spec, args))
    if not steps:
        raise SystemExit("quality: no configuration is left to run")
    results: dict[str, dict[str, Any]] = {}
    table: list[str] = []
    try:
        for start in range(0, len(steps), args.together):
            # The next ones import SGLang meanwhile.
            following = steps[start + args.together : start + 2 * args.together]
            results |= run.together(steps[start : start + args.together], following)
            # Whatever ends this run, the engines so far are in the report.
            table = summarise(run, spec, results)
    finally:
        run.close()
    print("\n" + "\n".join([*run.table, *table]), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--write", action="store_true", help="write the prompts; then nothing is measured")
    parser.add_argument("--calibration", type=Path, help="with --write: samples for lt-sglang calibrate")
    parser.add_argument("--samples", type=int, default=16, help="of --calibration")
    parser.add_argument("--sample-tokens", type=int, help="their length; default twice --recent-tokens")
    parser.add_argument("--trials", type=int, default=30, help="a length and task")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8000])
    parser.add_argument("--kl", type=int, default=16, help="texts")
    parser.add_argument("--recent-tokens", type=int, default=1020, help="of windows, with --write")
    parser.add_argument("--keys-outside", type=int, help="with --write: keys stand before the last of them")
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
        help="of each engine; they must hold the windows of all texts as well, or some are not cached",
    )
    parser.add_argument("--memory", type=float, default=0.5, help="mem_fraction_static of each engine")
    parser.add_argument("--top", type=int, default=512, help="log-probabilities a position")
    parser.add_argument("--limit-s", type=float, default=240)
    parser.add_argument("--budget-s", type=float, default=3600)
    args = parser.parse_args()
    args.configs = args.configs.split(",") if args.configs else []
    for text in args.config:
        name, _, value = text.partition("=")
        CONFIGS[name] = json.loads(value)
        args.configs.append(name)
    unknown = [name for name in args.configs if name not in CONFIGS]
    if unknown:
        parser.error(f"--configs: {unknown[0]!r} is not one of {', '.join(CONFIGS)}")
    if args.keys_outside is not None and args.keys_outside < args.recent_tokens:
        parser.error("--keys-outside: below --recent-tokens, so windows would reach the keys")
    if not args.write:
        if args.out is None:
            parser.error("--out: missing")
        args.model = args.model or ensure_model()
    return args


if __name__ == "__main__":
    main()
