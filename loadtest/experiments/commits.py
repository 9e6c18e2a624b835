r"""Speed of the same server at several commits, on one machine in one run, alternating.

    git worktree add /tmp/before COMMIT; make -C /tmp/before env
    python -m loadtest.experiments.commits OUT.json --tree before=/tmp/before --tree after=. \
        --model mistral-7b \
        --own "before=--max-total-tokens 220000" --own "after=--lt-kv-bytes 18000000000" \
        -- --load-format dummy --skip-tokenizer-init --mem-fraction-static 0.85 --lt-lazy-layers 8-23

The servers start at once and stand side by side on one GPU, so each must be told how much memory it may
take. A run is one body of prompts of random tokens: seconds until all have a token, and tokens/s from then
until the first answer has ended. Every round sends the same prompts to each server, in an order that turns;
a first round is not counted. Ratios are to the first tree. The file is written after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

import requests
from sglang.benchmark.stream_metrics import BatchStreamRecorder

from loadtest.experiments.offline import ROOT, stamped
from lt_sglang.bench.client import EVENT
from lt_sglang.bench.machine import commit_of
from lt_sglang.bench.servers import write_shape
from lt_sglang.cli.parser import positive
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.server_process import ServerProcess
from lt_sglang.planner.shapes import CONFIGS

SEED = 1
START_SECONDS = 300.0
Run = dict[str, float]


class Tree(ServerProcess):
    """The server of a checkout that has its ``.lt`` (make env), with the Python that runs this."""

    def __init__(self, name: str, root: Path, folder: Path) -> None:
        super().__init__(name, folder / f"{name}.log")
        self.root = root

    def serve(self, flags: Sequence[str]) -> None:
        """Start ``lt-sglang serve`` with ``flags``."""
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        others = [path for path in inherited if path and not Path(path).is_relative_to(ROOT)]
        paths = os.pathsep.join([str(self.root), str(self.root / ".lt"), *others])
        command = [sys.executable, "-m", "lt_sglang", "serve", *flags]
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        self.start([*command, *address], {**os.environ, "PYTHONPATH": paths}, cwd=self.root)


def run(url: str, prompts: list[list[int]], output: int) -> Run:
    """One body of ``prompts``, ``output`` tokens each: seconds of its prefill, tokens/s of its decode."""
    sampling = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": sampling, "stream": True}
    recorder = BatchStreamRecorder(len(prompts))
    began = time.perf_counter()
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(EVENT) and not line.endswith(b"[DONE]"):
                event = json.loads(line.removeprefix(EVENT))
                if "error" in event:
                    raise LightTransferError(f"{url}: {event['error']}")
                meta = event["meta_info"]
                ended = meta["finish_reason"]
                if ended and ended["type"] != "length":
                    raise LightTransferError(f"{url}: an answer ended early: {ended}")
                recorder.record_chunk(
                    index=event["index"],
                    completion_tokens=meta["completion_tokens"],
                    finish_type=ended and ended["type"],
                    now=time.perf_counter(),
                )
    window = recorder.steady_state_window()
    expected = output * len(prompts)
    if recorder.total_output_tokens != expected or window is None:
        raise LightTransferError(f"{url}: {recorder.total_output_tokens} tokens came of {expected}")
    return {"prefill_seconds": window.start - began, "decode_tokens_per_second": window.output_throughput}


def compare(runs: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Medians of each tree, and their ratios to the first's: above 1 is more seconds, or more tokens/s."""
    medians = {
        name: {key: median(row[key] for row in rows) for key in rows[0]} for name, rows in runs.items()
    }
    first = next(iter(medians.values()))
    return {
        name: middle | {f"{key}_ratio": middle[key] / first[key] for key in first}
        for name, middle in medians.items()
    }


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="commits", epilog="After --: flags of every server.")
    parser.add_argument("out", type=Path, help="the result file")
    parser.add_argument("--tree", type=_pair, action="append", required=True, help="NAME=FOLDER; repeatable")
    parser.add_argument(
        "--own", type=_pair, action="append", default=[], help="NAME='FLAGS' of one tree; once for each"
    )
    parser.add_argument("--model", required=True, help=f"a folder, or a shape: {', '.join(CONFIGS)}")
    parser.add_argument("--requests", type=positive, default=8)
    parser.add_argument("--input", type=positive, default=16384, help="tokens of a prompt")
    parser.add_argument("--output", type=positive, default=200, help="tokens of an answer")
    parser.add_argument("--rounds", type=positive, default=3)
    args = parser.parse_args(argv)
    trees, own = ([name for name, _ in pairs] for pairs in (args.tree, args.own))
    for flag, names in (("--tree", trees), ("--own", own)):
        if twice := [name for name in names if names.count(name) > 1]:
            parser.error(f"{flag}: {twice[0]} is named twice")
    if unknown := [name for name in own if name not in trees]:
        parser.error(f"--own: {unknown[0]!r} is not a --tree: {', '.join(trees)}")
    return args


def main(argv: list[str]) -> int:
    """Measure and write the result file."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args, flags = _parsed(argv[:cut]), argv[cut + 1 :]
    work = Path(mkdtemp(prefix="commits-"))
    model = (
        write_shape(args.model, work / args.model) if args.model in CONFIGS else Path(args.model).absolute()
    )
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    trees = [Tree(name, Path(root).absolute(), work) for name, root in args.tree]
    own, rng = dict(args.own), random.Random(SEED)
    length, count = args.input, args.requests
    sizes = {name: getattr(args, name) for name in ("model", "requests", "input", "output", "rounds")}
    result = stamped("commits", "the same server at several commits, alternating", seed=SEED, **sizes)
    result["trees"] = {tree.name: commit_of(tree.root) for tree in trees}
    runs: dict[str, list[Run]] = {tree.name: [] for tree in trees}
    with ExitStack() as stack:
        for tree in trees:
            stack.callback(tree.stop)
            tree.serve(["--model-path", str(model), *flags, *shlex.split(own.get(tree.name, ""))])
        for tree in trees:
            tree.wait_until_ready(START_SECONDS, tell=True)
        for number in range(args.rounds + 1):
            prompts = [[rng.randrange(10, vocabulary) for _ in range(length)] for _ in range(count)]
            turned = number % len(trees)
            for tree in (*trees[turned:], *trees[:turned]):
                row = run(tree.url, prompts, args.output)
                print(f"round {number} {tree.name}: {row}", flush=True)
                if number:
                    runs[tree.name].append(row)
            if number:
                result |= {"runs": runs, "medians": compare(runs)}
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["medians"], indent=1), flush=True)
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except LightTransferError as error:
        raise SystemExit(f"commits: {error}") from None
