"""``lt-sglang eval --suite conversations``: what later turns lose that inherit a cached prefix."""

from __future__ import annotations

import argparse
import json
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from lt_sglang.bench.machine import stamp
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.conversations import Answers, Row, as_dict, compare, converse, digest, table
from lt_sglang.eval.endpoint import Endpoint
from lt_sglang.eval.items import Tokenizer
from lt_sglang.eval.report import aligned
from lt_sglang.eval.tasks.conversations import Conversation, ConversationTask
from lt_sglang.launch.engine import Engine, EngineSpec
from lt_sglang.launch.processes import free_port
from lt_sglang.launch.ready import say

COLD = "-cold"
SAMPLE_SEED = 1000  # added for calibrate's samples: other texts, places and keys


def build(args: argparse.Namespace, tokenizer: Tokenizer, seed: int) -> list[Conversation]:
    """All conversations, a text of each task and length in turn; raises LightTransferError."""
    tasks = [
        ConversationTask(name, tokens, args.trials, args.recent_tokens, seed).conversations(tokenizer)
        for tokens in args.lengths
        for name in args.tasks
    ]
    # However far an arm comes within its time, it has as many of each.
    return [conversation for some in zip(*tasks, strict=True) for conversation in some]


def write_samples(path: Path, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Conversations of other texts with their answers, for lt-sglang calibrate."""
    last = [conversation.turns[-1] for conversation in build(args, tokenizer, args.seed + SAMPLE_SEED)]
    texts = [
        f"{tokenizer.decode(list(turn.prompt))} {turn.answers[0]}."
        for turn in last
        if turn.metric == "begins"
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    say(f"{path}: {len(texts)} samples")


class Suite:
    """One run: its conversations, its arms, and the files in ``folder`` that hold what they answered."""

    def __init__(
        self, args: argparse.Namespace, tokenizer: Tokenizer, names: Sequence[str], command: Sequence[str]
    ) -> None:
        """``names``: the engines', full attention first. ``command``: as it is shown in the report."""
        self.folder = Path(args.out)
        self._args, self._tokenizer, self._names, self._command = args, tokenizer, names, command
        self.conversations = build(args, tokenizer, args.seed)
        asked = digest(self.conversations)
        self.stopped = threading.Event()
        self._saving = threading.Lock()
        self.failed: list[str] = []
        arms = [arm for name in names for arm in self.arms_of(name)]
        self.answers = {arm: Answers(self.folder / f"{arm}.jsonl", arm, asked) for arm in arms}

    def arms_of(self, engine: str) -> list[str]:
        """The ways in which an engine is asked."""
        return [engine, *([f"{engine}{COLD}"] if engine in self._args.cold else [])]

    def left(self, engine: str) -> bool:
        """Whether an engine has something left to answer."""
        return any(len(self.answers[arm].replies) < len(self.conversations) for arm in self.arms_of(engine))

    def ask(self, endpoint: Endpoint) -> None:
        """All arms of one engine; raises LightTransferError."""
        for arm in self.arms_of(endpoint.name):
            over = self._timer()
            whole = converse(
                endpoint,
                self.conversations,
                self.answers[arm],
                cold=arm != endpoint.name,
                until=over,
                progress=_progress(arm),
            )
            if not whole:
                say(f"{arm}: {len(self.answers[arm].replies)} of {len(self.conversations)} conversations")
            self.save()

    def _timer(self) -> Callable[[], bool]:
        """Whether an arm that begins now must end, by --limit-s or Ctrl-C."""
        limit: float | None = self._args.limit_s
        end = None if limit is None else time.monotonic() + limit
        return lambda: self.stopped.is_set() or (end is not None and time.monotonic() > end)

    def rows(self) -> list[Row]:
        """Of the arms that answered anything so far."""
        full, *others = self.answers.values()
        if not full.replies:
            return []
        arms = [full, *(arm for arm in others if arm.replies)]
        return compare(self.conversations, arms, self._tokenizer, self._args.margin)

    def save(self) -> list[Row]:
        """report.json and table.txt, of what is there."""
        with self._saving:
            rows = self.rows()
            text = json.dumps(self._report(rows), indent=1) + "\n"
            (self.folder / "report.json").write_text(text, encoding="utf-8")
            (self.folder / "table.txt").write_text(aligned(table(rows)) + "\n", encoding="utf-8")
        return rows

    def _report(self, rows: Sequence[Row]) -> dict[str, Any]:
        args = self._args
        model = Path(args.tokenizer or args.model_path).name
        return {
            **stamp("quality-conversations", seed=args.seed),
            "command": shlex.join(["lt-sglang", "eval", *self._command]),
            "workload": {
                "model": model,
                "tasks": list(args.tasks),
                "tokens": list(args.lengths),
                "texts": args.trials,
                "window": args.recent_tokens,
                "history": "right answers, whatever an engine said",
                "conversations": len(self.conversations),
            },
            "arms": {
                name: {
                    "server": {**arm.info, "model_path": model},
                    "cold": name not in self._names,
                    "conversations": len(arm.replies),
                    "rows": [as_dict(row) for row in rows if row.arm == name],
                }
                for name, arm in self.answers.items()
                if arm.replies
            },
        }


def run(
    args: argparse.Namespace,
    specs: Sequence[EngineSpec],
    endpoints: Sequence[Endpoint],
    tokenizer: Tokenizer,
    command: Sequence[str],
) -> int:
    """Ask all engines, a batch of them at a time; print the table. 1 if an engine failed."""
    if args.samples_out:
        write_samples(Path(args.samples_out), args, tokenizer)
        return 0
    names = [*(spec.name for spec in specs), *(endpoint.name for endpoint in endpoints)]
    suite = Suite(args, tokenizer, names, command)
    try:
        for endpoint in endpoints:
            suite.ask(endpoint)
        todo = [spec for spec in specs if suite.left(spec.name)]
        for start in range(0, len(todo), args.together):
            _together(suite, todo[start : start + args.together], args.clients)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on; results so far are in {suite.folder}")
        suite.save()
        raise
    print(aligned(table(suite.save())))
    for failure in suite.failed:
        say(failure)
    return 1 if suite.failed else 0


def _together(suite: Suite, specs: Sequence[EngineSpec], clients: int) -> None:
    """Start these engines at once and ask each; one that fails leaves the others alone."""
    if len(specs) > 1:
        # Side by side they could choose the same free port.
        specs = [replace(spec, own=(*spec.own, f"--nccl-port={free_port()}")) for spec in specs]
    engines = [Engine(spec, suite.folder / f"{spec.name}.log") for spec in specs]

    def one(engine: Engine) -> None:
        try:
            with engine:
                suite.ask(Endpoint(engine.name, engine.url, clients))
        except LightTransferError as error:
            suite.failed.append(str(error))

    try:
        # Processes end with the thread that starts them, so this one does.
        for engine in engines:
            engine.hold()
        with ThreadPoolExecutor(len(engines)) as pool:
            try:
                list(pool.map(one, engines))
            except KeyboardInterrupt:
                suite.stopped.set()
                for engine in engines:
                    engine.stop()  # nobody waits for one that is still starting
                raise
    finally:
        for engine in engines:
            engine.stop()


def check(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise LightTransferError if --cold names no engine of these."""
    for name in args.cold:
        if name not in names:
            raise LightTransferError(f"--cold {name}: names no engine; one of {', '.join(names)}")
        if f"{name}{COLD}" in names:
            raise LightTransferError(f"--cold {name}: there is an engine {name}{COLD} already")


def _progress(name: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    from tqdm import tqdm

    return lambda found, count: tqdm(found, desc=name, total=count)
