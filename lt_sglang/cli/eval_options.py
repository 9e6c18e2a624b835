"""The options of ``lt-sglang eval``."""

from __future__ import annotations

import argparse
import textwrap

from lt_sglang.cli.eval_suites import FILES, PROMPTS, SUITES, TASKS
from lt_sglang.cli.parser import Parser, numbers, positive, positive_float, seed, share
from lt_sglang.eval.intervals import DEFAULT_MARGIN
from lt_sglang.eval.tasks.conversations import CONVERSATIONS
from lt_sglang.eval.tasks.longbench import LONGBENCH

EPILOG = """\
The first engine is full attention; the others are compared with it, item by item.

examples:
  lt-sglang eval --tokenizer M --endpoint full=http://a:30000 --endpoint half=http://b:30000 --out quality
  lt-sglang eval --model-path M --engine full --engine "half=--lt-mode dynamic --lt-score residual-error" \\
      --tasks passkey,3-key,text --lengths 4096,8192 --out quality --tp-size 2
  lt-sglang eval --suite ruler --model-path M --shares 0.5,0.75 --static layers.json --squad dev-v2.0.json \\
      --hotpotqa hotpot_dev_distractor_v1.json --lengths 4096,16384 --out ruler
  lt-sglang eval --suite paper --model-path M --shares 0.25,0.5 --longbench LongBench --out paper
  lt-sglang eval --suite conversations --model-path M --engines arms.yaml --cold half --out turns --no-plots

suites:
{suites}
A file that is not given leaves its tasks out. Prompts of LongBench (1 and 2) and histories of LongMemEval
that are longer than the longest of --lengths are shortened.

--suite conversations asks several turns about one text, with the prefix cache. An engine that is also named
by --cold is asked a second time without the cache. Started again with the same --out, it goes on where it
stopped."""


def _told() -> str:
    """A line for each suite: what is asked by default, and the flags of its files."""
    lines = []
    for name, suite in SUITES.items():
        parts = [*suite.tasks, *(f"--{flag}" for flag in suite.files)]
        lines += textwrap.wrap(
            f"{name:14}{' '.join(parts)}",
            width=110,
            initial_indent="  ",
            subsequent_indent=" " * 16,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def parser() -> Parser:
    """Every option of ``lt-sglang eval``."""
    found = Parser(
        prog="lt-sglang eval",
        description="Ask full attention and lightened engines the same questions; say what lazy layers cost. "
        "Flags not named here go to SGLang, on all engines that are started.",
        epilog=EPILOG.format(suites=_told()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    engines = found.add_mutually_exclusive_group(required=True)
    engines.add_argument("--endpoint", action="append", metavar="NAME=URL", help="a running server")
    engines.add_argument(
        "--engine",
        action="append",
        metavar="NAME[=OPTIONS]",
        help="start one with these --lt-* options; the first, without any, is stock SGLang",
    )
    engines.add_argument(
        "--engines", metavar="FILE.yaml", help="the same, of a file: NAME: OPTIONS, or NAME: without any"
    )
    engines.add_argument(
        "--shares",
        type=_shares,
        metavar="0.5,0.75",
        help="full attention, and dynamic mode with these shares of the layers lazy; --lt-* flags go to all "
        "engines but the first",
    )
    found.add_argument(
        "--static",
        metavar="FILE.json|PATTERN",
        help="of --shares: static lists too, by calibrate's file or a pattern: ends, random, pyramid",
    )
    found.add_argument("--suite", choices=SUITES, default=PROMPTS, help="which tasks; see below")
    found.add_argument(
        "--cold", action="append", default=[], metavar="NAME", help="ask this engine without the cache too"
    )
    found.add_argument("--limit-s", type=positive_float, help="seconds for each way to ask an engine")
    found.add_argument(
        "--together", type=positive, default=1, help="engines of --suite conversations at a time, default 1"
    )
    found.add_argument(
        "--samples-out", metavar="FILE.jsonl", help="write other conversations for calibrate; ask nothing"
    )
    found.add_argument("--model-path", "--model", help="of engines that are started")
    found.add_argument("--tokenizer", help="a folder or a hub name; the model's by default")
    found.add_argument("--out", required=True, help="folder of report.json, table.txt and the figures")
    found.add_argument("--tasks", type=_tasks, help=f"some of a suite's: {', '.join(TASKS)}; default all")
    found.add_argument(
        "--lengths",
        type=numbers,
        default=(4096, 8192),
        help="prompt tokens, e.g. 4096,8192; answers take up to 128 more",
    )
    found.add_argument("--trials", type=positive, default=30, help="a task and length, default 30")
    found.add_argument(
        "--recent-tokens", type=positive, default=1020, help="keys are stated before the last of them"
    )
    found.add_argument("--text", help="a text file: RULER's essays, and what perplexity and KL are of")
    found.add_argument("--texts", type=positive, default=16, help="passages of the task text, default 16")
    found.add_argument(
        "--continuation", type=positive, default=64, help="positions of the task text, default 64"
    )
    found.add_argument("--top", type=positive, default=256, help="log-probabilities a position, default 256")
    for name, told in FILES.items():
        form, _, what = told.partition(": ")
        found.add_argument(f"--{name}", metavar=form, help=what)
    found.add_argument("--longbench-tasks", type=_longbench, help=f"of {', '.join(LONGBENCH)}")
    found.add_argument("--samples", type=positive, help="of each file; all by default")
    found.add_argument("--math-tokens", type=positive, default=2048, help="new tokens, default 2048")
    found.add_argument("--chat", action="store_true", help="use the chat template for files' questions")
    found.add_argument(
        "--margin", type=share, default=DEFAULT_MARGIN, help="a loss one accepts, default 0.05"
    )
    found.add_argument("--seed", type=seed, default=0)
    found.add_argument("--clients", type=positive, default=8, help="requests at a time, default 8")
    found.add_argument("--no-plots", dest="plots", action="store_false", help="no figures")
    return found


def _tasks(text: str) -> tuple[str, ...]:
    return _some(text, (*TASKS, *CONVERSATIONS))


def _longbench(text: str) -> list[str]:
    return list(_some(text, tuple(LONGBENCH)))


def _some(text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
    return names


def _shares(text: str) -> tuple[float, ...]:
    return tuple(share(part.strip()) for part in text.split(","))
