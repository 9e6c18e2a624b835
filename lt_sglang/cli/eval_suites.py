"""The suites of ``lt-sglang eval``: which tasks, which files, and the questions made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lt_sglang.cli import eval_conversations
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.evaluate import Questions
from lt_sglang.eval.items import Item, Tokenizer, rng_of
from lt_sglang.eval.tasks.conversations import CONVERSATIONS
from lt_sglang.eval.tasks.files import Reading
from lt_sglang.eval.tasks.haystack import Prose
from lt_sglang.eval.tasks.longbench import OF_THE_PAPER, longbench, longbench_v2
from lt_sglang.eval.tasks.passkey import PasskeyTask
from lt_sglang.eval.tasks.published import MATH_METRICS, ifeval, longmemeval, mathematics
from lt_sglang.eval.tasks.ruler import SHAPES, NiahTask
from lt_sglang.eval.tasks.ruler_qa import QA_FILES, QaTask
from lt_sglang.eval.tasks.ruler_words import WORD_TASKS, WordsTask
from lt_sglang.launch.ready import say

KEY_TASKS = {"passkey": 1, "3-key": 3}
TEXT = "text"
RULER = (*SHAPES, *WORD_TASKS, *QA_FILES)
TASKS = (*KEY_TASKS, *RULER, TEXT)
PROMPTS, TURNS, PAPER = "prompts", "conversations", "paper"
OF_TURNS = ("cold", "limit_s", "samples_out", "together")
# What --squad and --hotpotqa are for; every other flag of FILES is a benchmark.
FOR_RULER = tuple(QA_FILES.values())
MATH = tuple(MATH_METRICS)
FILES = {
    "longbench": "FOLDER: LongBench's config/ and data/",
    "longbench-v2": "FILE.json: LongBench v2",
    "longmemeval": "FILE.json: LongMemEval",
    "ifeval": "FILE.jsonl: IFEval",
    **dict.fromkeys(MATH, "FILE.jsonl: problems with their answers"),
    "squad": "FILE.json: SQuAD, for RULER's qa_1",
    "hotpotqa": "FILE.json: HotpotQA, for RULER's qa_2",
}


class Suite(NamedTuple):
    """tasks: those asked by default. files: the flags whose files it can ask. known: all tasks it has."""

    tasks: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    known: tuple[str, ...] = ()


_NEEDLES = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2")
SUITES = {
    PROMPTS: Suite((*KEY_TASKS, TEXT), tuple(FILES), TASKS),
    TURNS: Suite(tuple(CONVERSATIONS), (), tuple(CONVERSATIONS)),
    # Figure 4, tables 2, 3 and 8 of arXiv 2410.13846.
    PAPER: Suite((*_NEEDLES, "niah_multikey_3", TEXT), ("longbench", *MATH), TASKS),
    "ruler": Suite(RULER, FOR_RULER, RULER),
    "longbench": Suite(files=("longbench",)),
    "longbench-v2": Suite(files=("longbench-v2",)),
    "longmemeval": Suite(files=("longmemeval",)),
    "ifeval": Suite(files=("ifeval",)),
    "math": Suite(files=MATH),
}


def given(args: argparse.Namespace, flag: str) -> str | None:
    """The value of a flag of FILES."""
    path: str | None = getattr(args, flag.replace("-", "_"))
    return path


def check(args: argparse.Namespace, names: list[str]) -> None:
    """Settle ``args.tasks``; raise LightTransferError for what other suites have, and for missing files."""
    suite = SUITES[args.suite]
    for name in FILES:
        if given(args, name) is not None and name not in suite.files:
            allowed = " or ".join(other for other, has in SUITES.items() if name in has.files)
            raise LightTransferError(f"--{name}: only with --suite {allowed}")
    if args.suite != TURNS:
        for name in OF_TURNS:
            if getattr(args, name) not in (None, [], 1):
                raise LightTransferError(f"--{name.replace('_', '-')}: only with --suite {TURNS}")
    for name in args.tasks or ():
        if name not in suite.known:
            has = f"one of {', '.join(suite.known)}" if suite.known else "it has no tasks to choose from"
            raise LightTransferError(f"--tasks {name}: not of --suite {args.suite}; {has}")
        if name in QA_FILES and given(args, QA_FILES[name]) is None:
            raise LightTransferError(f"--tasks {name}: needs --{QA_FILES[name]} FILE")
    if args.suite == TURNS:
        eval_conversations.check(args, names)
    missing = [name for name in suite.files if given(args, name) is None]
    if not suite.tasks and len(missing) == len(suite.files):
        needed = " or ".join(f"--{name} {FILES[name].partition(':')[0]}" for name in missing)
        raise LightTransferError(f"--suite {args.suite}: needs {needed}")
    if args.tasks is None:
        if args.suite != PROMPTS and missing:
            say(f"--suite {args.suite}: left out, as not given: {', '.join(f'--{name}' for name in missing)}")
        args.tasks = tuple(
            name for name in suite.tasks if name not in QA_FILES or QA_FILES[name] not in missing
        )


def build_questions(args: argparse.Namespace, tokenizer: Tokenizer) -> Questions:
    """The prompts that the arguments ask for; raises LightTransferError."""
    prose = Prose.load(tokenizer, args.text)
    items = [
        item
        for tokens in args.lengths
        for name in args.tasks
        if name != TEXT
        for item in _generated(args, name, tokens, prose).items(tokenizer)
    ]
    reading = Reading(tokenizer, args.samples, max(args.lengths), args.chat, args.math_tokens)
    for flag, ask in _readers(args, reading).items():
        if (path := given(args, flag)) is not None:
            items += ask(path)
    texts = []
    if TEXT in args.tasks:
        # The text is as long as the shortest length asked for, then its continuation.
        prompt = min(args.lengths)
        rng = rng_of(args.seed, TEXT)
        for ids in prose.passages(args.texts, prompt + args.continuation + 1, rng):
            texts.append((tuple(ids[:prompt]), tuple(ids[prompt:])))
    if not items and not texts:
        raise LightTransferError("--tasks: nothing to ask")
    return Questions(tuple(items), tuple(texts), args.top)


def _generated(
    args: argparse.Namespace, name: str, tokens: int, prose: Prose
) -> PasskeyTask | NiahTask | WordsTask | QaTask:
    if name in KEY_TASKS:
        return PasskeyTask(tokens, args.trials, KEY_TASKS[name], args.recent_tokens, args.seed)
    if name in SHAPES:
        return NiahTask(name, tokens, args.trials, prose, args.seed)
    if name in WORD_TASKS:
        return WordsTask(name, tokens, args.trials, prose, args.seed)
    return QaTask(name, tokens, args.trials, given(args, QA_FILES[name]) or "", args.seed)


def _readers(args: argparse.Namespace, reading: Reading) -> dict[str, Callable[[str], list[Item]]]:
    """By flag, what makes questions of its file."""
    tasks = args.longbench_tasks or (OF_THE_PAPER if args.suite == PAPER else ())
    return {
        "longbench": lambda path: longbench(path, reading, tasks),
        "longbench-v2": lambda path: longbench_v2(path, reading),
        "longmemeval": lambda path: longmemeval(path, reading),
        "ifeval": lambda path: ifeval(path, reading),
        **{name: partial(mathematics, name, reading=reading) for name in MATH},
    }
