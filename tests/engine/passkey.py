"""Pass keys found with lazy layers, against full attention: a measurement on the demo model, run by hand.

    make env; python -m tests.engine.passkey --date 2026-11-22 --commit SHA [--trials 30] [--out FOLDER]

Starts one server after another on this machine's CPU, in bfloat16: stock SGLang, then dynamic mode with each
score and share of layers kept. All get the same prompts: text with a five-digit key stated outside every
window, at depths spread over the prompt, that ends in "The pass key is". A trial counts if the answer begins
with the key. One JSON file an engine, compared with stock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lt_sglang.demo.smollm2 import ensure_model

from .passages import passage, tokenizer
from .server import Server, ServerSpec

RESULTS = Path(__file__).resolve().parents[2] / "loadtest" / "results"
LAYERS = 30
SINKS, RECENT = 4, 1020
NEW_TOKENS = 6
CONTEXT = 8192
FLAGS = ("--chunked-prefill-size", "2048", "--max-total-tokens", "17000", "--mem-fraction-static", "0.5")
VERSIONS = {"sglang": "0.5.23", "torch": "2.14.1"}


@dataclass(frozen=True)
class Engine:
    """score, keep: of dynamic mode; None for stock SGLang."""

    name: str
    score: str | None = None
    keep: float | None = None
    decide: str = "prompt"

    @property
    def config(self) -> dict[str, Any] | None:
        """Its value of the key ``lighttransfer``."""
        if self.score is None:
            return None
        return {
            "mode": "dynamic",
            "score": self.score,
            "keep": self.keep,
            "decide": self.decide,
            "sink_tokens": SINKS,
            "recent_tokens": RECENT,
        }


ENGINES = (
    Engine("stock"),
    Engine("residual-error-keep-0.5", "residual-error", 0.5),
    Engine("residual-error-keep-0.35", "residual-error", 0.35),
    Engine("lighttransfer-keep-0.5", "lighttransfer", 0.5),
    Engine("residual-error-first-chunk-keep-0.5", "residual-error", 0.5, "first-chunk"),
)


@dataclass(frozen=True)
class Trial:
    """One prompt; ``depth`` says where its key is."""

    tokens: int
    depth: float
    prompt: list[int]
    key: str


def make_trials(lengths: Sequence[int], count: int, seed: int) -> list[Trial]:
    """``count`` a length; keys at depths from 0 to where a window ends."""
    rng = random.Random(seed)
    trials = []
    for tokens in lengths:
        deepest = 1 - (RECENT + 100) / tokens
        for number in range(count):
            depth = deepest * number / max(count - 1, 1)
            trials.append(Trial(tokens, round(depth, 3), *passage(tokens, rng, depth)))
    return trials


def measure(engine: Engine, trials: Sequence[Trial], log: Path, dtype: str) -> list[dict[str, Any]]:
    """What ``engine`` answered to each trial."""
    spec = ServerSpec(engine.name, partial(ensure_model), engine.config, (*FLAGS, "--dtype", dtype))
    server = Server(spec, log)
    server.launch()
    try:
        server.wait_until_ready()
        answers = []
        for trial in trials:
            reply = server.generate(trial.prompt, NEW_TOKENS, ask=engine.config is not None)
            text = tokenizer().decode(reply.tokens)
            answers.append(
                {
                    "tokens": trial.tokens,
                    "depth": trial.depth,
                    "found": text.strip().startswith(trial.key),
                    "key": trial.key,
                    "answer": text,
                    "lazy_layers": reply.choice and reply.choice["lazy_layers"],
                }
            )
            print(engine.name, len(answers), len(trials), answers[-1]["found"], repr(text), flush=True)
        return answers
    finally:
        server.stop()


def found(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, over all and by length."""
    lengths = sorted({answer["tokens"] for answer in answers})
    by_length = {n: [a["found"] for a in answers if a["tokens"] == n] for n in lengths}
    return {str(n): {"found": sum(hits), "of": len(hits)} for n, hits in by_length.items()}


def main() -> None:
    """Measure, and write one file an engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--date", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--trials", type=int, default=30, help="a length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8000])
    parser.add_argument("--engines", nargs="+", default=[engine.name for engine in ENGINES])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    trials = make_trials(args.lengths, args.trials, seed=0)
    folder = Path(tempfile.mkdtemp(prefix="passkey-"))
    stock = None
    for engine in ENGINES:
        if engine.name != "stock" and engine.name not in args.engines:
            continue
        answers = measure(engine, trials, folder / f"{engine.name}.log", args.dtype)
        if engine.name == "stock":
            stock = found(answers)
            continue
        assert stock is not None
        ours = found(answers)
        scenario = f"passkey-{engine.name}"
        result = {
            "scenario": scenario,
            "hardware": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
            "versions": VERSIONS,
            "commit": args.commit,
            "seed": 0,
            "workload": {
                "model": f"SmolLM2-135M-Instruct, {args.dtype}, tp 1",
                "kind": "passkey",
                "prompt_tokens": args.lengths,
                "trials_per_length": args.trials,
            },
            "baseline": {"engine": "stock torch_native, full attention", "found": stock},
            "lighttransfer": {"config": engine.config, "found": ours},
            "found_ratio": {
                n: round(ours[n]["found"] / stock[n]["found"], 4) if stock[n]["found"] else None for n in ours
            },
            "notes": [],
            "trials": answers,
        }
        path = args.out / f"{args.date}-cpu-{scenario}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(path, json.dumps(result["found_ratio"]), stock, ours, flush=True)


if __name__ == "__main__":
    main()
