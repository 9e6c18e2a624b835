"""Bar 4: the same run on one process and on two that share the weights (FSDP2); every loss within 1 %.

    python -m loadtest.experiments.train_fsdp OUT [--gpus 2] [--steps 20] [--rehearse]

Both runs are lt-sglang train itself, with the same rows in every step, in the same order. OUT/fsdp.json has
the losses, OUT/one.log and OUT/several.log what the runs printed. --rehearse: a tiny model, two processes on
a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

NEAR = 0.01
LIMIT_S = 240.0


def write_data(path: Path, rows: int, tokens: int) -> None:
    """Samples of more than ``tokens`` tokens with a short prompt, no two alike: all rows have one length."""
    from lt_sglang.eval.tasks.haystack import SENTENCES

    rng = random.Random(4)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            text = " ".join(rng.choice(SENTENCES) for _ in range(tokens // 9))
            file.write(json.dumps({"prompt": text[:100], "completion": text[100:]}) + "\n")


def losses(name: str, words: list[str], out: Path) -> tuple[list[float], float]:
    """Of every step of one run, and its seconds; raises CalledProcessError."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    started = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        command = [sys.executable, "-W", "ignore", "-m", "lt_sglang", "train", *words]
        subprocess.run(command, check=True, stdout=log, stderr=log, env=env, cwd=ROOT, timeout=LIMIT_S)
    history = json.loads((out / name / "log.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry], time.monotonic() - started


def main() -> None:
    """Both runs, and the comparison; exit code 1 if a loss is too far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    layers, recent = "0-6,8-13,15-16,19,22,24-25,27-29", 1020
    if args.rehearse:
        from tests.engine.models import ensure_model as tiny

        model, layers, recent, args.tokens, args.steps = tiny("llama"), "1,3,5", 60, 256, 4
    else:
        from lt_sglang.demo.smollm2 import ensure_model

        model = args.model or ensure_model()
    data = out / "data.jsonl"
    write_data(data, 2 * args.gpus * args.steps, args.tokens)
    words = ["--model-path", str(model), "--data", str(data), "--lt-lazy-layers", layers]
    words += ["--lt-recent-tokens", str(recent), "--max-length", str(args.tokens), "--no-packing"]
    words += ["--max-steps", str(args.steps), "--learning-rate", "1e-4", "--no-plots"]
    if args.rehearse:
        words += ["--device", "cpu", "--precision", "float32"]
    report: dict[str, Any] = {"model": model.name, "gpus": args.gpus, "tokens": args.tokens}
    for name, more in (("one", ["--accumulate", str(args.gpus)]), ("several", ["--gpus", str(args.gpus)])):
        found, seconds = losses(name, [*words, *more, "--out", str(out / name)], out)
        report[name] = {"losses": found, "seconds": round(seconds, 1)}
        (out / "fsdp.json").write_text(json.dumps(report, indent=1))
    pairs = list(zip(report["one"]["losses"], report["several"]["losses"], strict=True))
    report["worst"] = max(abs(other / one - 1) for one, other in pairs)
    report["steps"] = len(pairs)
    report["pass"] = len(pairs) == args.steps and report["worst"] <= NEAR
    (out / "fsdp.json").write_text(json.dumps(report, indent=1))
    print(
        f"{len(pairs)} steps on 1 and {args.gpus} processes: worst difference of a loss {report['worst']:.5f}"
    )
    print(f"fsdp: {'PASS' if report['pass'] else 'FAIL'}")
    sys.exit(0 if report["pass"] else 1)


if __name__ == "__main__":
    main()
