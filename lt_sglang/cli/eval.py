"""``lt-sglang eval``: what lazy layers cost, against full attention."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lt_sglang.cli import eval_conversations
from lt_sglang.cli.parser import Parser, positive, positive_float, seed, share
from lt_sglang.cli.preflight import check_engines
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.endpoint import Endpoint
from lt_sglang.eval.evaluate import Outcome, Questions, Row, ask, compare
from lt_sglang.eval.intervals import DEFAULT_MARGIN
from lt_sglang.eval.items import HfTokenizer, Item, rng_of
from lt_sglang.eval.plots import depth_heatmaps, require_matplotlib
from lt_sglang.eval.report import as_dict, table
from lt_sglang.eval.tasks.conversations import CONVERSATIONS
from lt_sglang.eval.tasks.files import LONGBENCH, MATH_METRICS, longbench, mathematics
from lt_sglang.eval.tasks.haystack import Prose
from lt_sglang.eval.tasks.passkey import PasskeyTask
from lt_sglang.eval.tasks.ruler import SHAPES, NiahTask
from lt_sglang.launch.engine import Engine, EngineSpec
from lt_sglang.launch.processes import free_port
from lt_sglang.launch.ready import say

KEY_TASKS = {"passkey": 1, "3-key": 3}
TEXT = "text"
TASKS = (*KEY_TASKS, *SHAPES, TEXT)
PROMPTS, TURNS = "prompts", "conversations"
OF_TURNS = ("cold", "limit_s", "samples_out", "together")
DEFAULT_TASKS = {PROMPTS: ("passkey", "3-key", TEXT), TURNS: tuple(CONVERSATIONS)}
EPILOG = """\
The first engine is full attention; the others are compared with it, item by item.

examples:
  lt-sglang eval --tokenizer M --endpoint full=http://a:30000 --endpoint half=http://b:30000 --out quality
  lt-sglang eval --model-path M --engine full --engine "half=--lt-mode dynamic --lt-score residual-error" \\
      --tasks passkey,3-key,text --lengths 4096,8192 --out quality --tp-size 2
  lt-sglang eval --suite conversations --model-path M --engines arms.yaml --cold half --out turns --no-plots

--suite conversations asks several turns about one text, with the prefix cache; its tasks are
{conversations}.
An engine that is also named by --cold is asked a second time without the cache. Started again with the same
--out, it goes on where it stopped."""


def run(argv: list[str]) -> int:
    """Print the table; writes report.json and the figures. Raises LightTransferError."""
    args, shared = _parser().parse_known_args(argv)
    turns = args.suite == TURNS
    args.tasks = args.tasks or DEFAULT_TASKS[args.suite]
    if args.plots and not turns:
        require_matplotlib()  # before hours of measuring
    if args.engines:
        args.engine = read_engines(Path(args.engines))
    check(args, shared)
    specs = engine_specs(args, shared)
    tokenizer = HfTokenizer(args.tokenizer or args.model_path)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    if turns:
        endpoints = [Endpoint(name, url, args.clients) for name, url in map(_pair, args.endpoint or ())]
        return eval_conversations.run(args, specs, endpoints, tokenizer, _shown(argv, args))
    questions = build_questions(args, tokenizer)
    outcomes: list[Outcome] = []
    try:
        for outcome in measure(args, specs, questions, tokenizer, folder):
            outcomes.append(outcome)
    except KeyboardInterrupt:
        names = ", ".join(outcome.name for outcome in outcomes) or "none"
        say(f"stopped; of the engines, {names} answered everything; logs and results are in {folder}")
        if len(outcomes) > 1:
            finish(args, questions, outcomes, folder)
        raise
    finish(args, questions, outcomes, folder)
    return 0


def finish(args: argparse.Namespace, questions: Questions, outcomes: list[Outcome], folder: Path) -> None:
    """Compare the engines asked, write what was found and print the table."""
    rows = compare(questions, outcomes, args.margin)
    write(args, questions, outcomes, rows, folder)
    print(table(rows))


def check(args: argparse.Namespace, shared: list[str]) -> None:
    """Raise LightTransferError if engines cannot be told apart or compared, or there is no model to ask."""
    flag, texts = ("--endpoint", args.endpoint) if args.endpoint else ("--engine", args.engine)
    names = [_pair(text)[0] if args.endpoint else text.partition("=")[0] for text in texts]
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise LightTransferError(f"{flag} {name!r}: a name has letters, digits, '.', '_' and '-' only")
        if names.count(name) > 1:
            raise LightTransferError(f"{flag} {name}: named twice")
    ours = [word for word in shared if word.startswith("--lt-")]
    if ours:
        raise LightTransferError(f"{ours[0]}: is of one engine; write --engine 'NAME={ours[0]} ...'")
    if shared and args.endpoint:
        raise LightTransferError(
            f"{shared[0]}: unknown option, and --endpoint starts no engine to give it to"
        )
    if len(names) < 2:
        raise LightTransferError(f"{flag} {names[0]}: nothing to compare it with; give {flag} twice or more")
    if args.engine and args.tokenizer and not args.model_path:
        raise LightTransferError("--model-path: missing; it is what --engine starts")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise LightTransferError(f"--out {args.out}: must be a folder")
    if not (args.tokenizer or args.model_path):
        raise LightTransferError("--tokenizer: missing; the model's folder or hub name (or --model-path)")
    _check_suite(args, names)


def _check_suite(args: argparse.Namespace, names: list[str]) -> None:
    """Raise LightTransferError for what the other suite has."""
    other, names_of = (PROMPTS, ("longbench", *MATH_METRICS)) if args.suite == TURNS else (TURNS, OF_TURNS)
    for name in names_of:
        if getattr(args, name) not in (None, [], 1):
            raise LightTransferError(f"--{name.replace('_', '-')}: only with --suite {other}")
    known = CONVERSATIONS if args.suite == TURNS else TASKS
    for name in args.tasks:
        if name not in known:
            raise LightTransferError(
                f"--tasks {name}: not of --suite {args.suite}; one of {', '.join(known)}"
            )
    if args.suite == TURNS:
        eval_conversations.check(args, names)


def read_engines(path: Path) -> list[str]:
    """A file of ``--engines`` as ``--engine`` has it, NAME=OPTIONS; raises LightTransferError."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LightTransferError(f"--engines {path}: cannot be read ({error})") from None
    if not isinstance(found, dict) or not found:
        raise LightTransferError(f"--engines {path}: must be a mapping of names to options")
    for name, options in found.items():
        if not isinstance(name, str) or not (options is None or isinstance(options, str)):
            raise LightTransferError(f"--engines {path}: {name}: options must be text, or nothing")
    return [f"{name}={options}" if options else name for name, options in found.items()]


def engine_specs(args: argparse.Namespace, shared: list[str]) -> list[EngineSpec]:
    """The engines to start, each of which can; raises LightTransferError that names the one that cannot."""
    specs = []
    for number, text in enumerate(args.engine or ()):
        name, _, options = text.partition("=")
        try:
            words = shlex.split(options)
        except ValueError as error:
            raise LightTransferError(f"--engine {name}: {options!r}: {error}") from None
        stock = number == 0 and not any(word.startswith("--lt-") for word in words)
        specs.append(EngineSpec(name, args.model_path, tuple(shared), tuple(words), stock))
    commands = {}
    for spec in specs:
        try:
            commands[f"--engine {spec.name}"], _ = spec.command(free_port())
        except LightTransferError as error:
            raise LightTransferError(f"--engine {spec.name}: {error}") from None
    check_engines(commands)
    return specs


def build_questions(args: argparse.Namespace, tokenizer: HfTokenizer) -> Questions:
    """The prompts that the arguments ask for; raises LightTransferError."""
    items: list[Item] = []
    prose = Prose.load(tokenizer, args.text)
    for tokens in args.lengths:
        for name in args.tasks:
            if name in KEY_TASKS:
                keys = PasskeyTask(tokens, args.trials, KEY_TASKS[name], args.recent_tokens, args.seed)
                items += keys.items(tokenizer)
            elif name in SHAPES:
                items += NiahTask(name, tokens, args.trials, prose, args.seed).items(tokenizer)
    if args.longbench:
        longest = max(args.lengths)
        items += longbench(args.longbench, args.longbench_tasks, args.samples, longest, tokenizer, args.chat)
    for name in MATH_METRICS:
        if path := getattr(args, name):
            items += mathematics(name, path, args.samples, args.math_tokens, tokenizer, args.chat)
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


def measure(
    args: argparse.Namespace,
    specs: list[EngineSpec],
    questions: Questions,
    tokenizer: HfTokenizer,
    folder: Path,
) -> Iterator[Outcome]:
    """Ask every engine, one after the other."""
    if args.endpoint:
        endpoints = [Endpoint(name, url, args.clients) for name, url in map(_pair, args.endpoint)]
        for endpoint in endpoints:
            endpoint.info()  # all of them answer, before the first is measured
        for endpoint in endpoints:
            yield ask(endpoint, questions, tokenizer, _progress(endpoint.name))
    for spec in specs:
        with Engine(spec, folder / f"{spec.name}.log") as engine:
            endpoint = Endpoint(spec.name, engine.url, args.clients)
            yield ask(endpoint, questions, tokenizer, _progress(spec.name))


def write(
    args: argparse.Namespace,
    questions: Questions,
    outcomes: list[Outcome],
    rows: list[Row],
    folder: Path,
) -> None:
    """report.json, table.txt and the figures."""
    report = as_dict(vars(args), questions, outcomes, rows)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "table.txt").write_text(table(rows) + "\n", encoding="utf-8")
    if args.plots:
        depth_heatmaps(questions, outcomes, folder)


def _progress(name: str) -> Any:
    from tqdm import tqdm

    def bar(results: Iterable[Any], count: int) -> Iterable[Any]:
        return tqdm(results, desc=name, total=count) if count else results

    return bar


def _shown(argv: list[str], args: argparse.Namespace) -> list[str]:
    """The command line without this machine's paths."""
    for path, name in ((args.model_path, "M"), (args.tokenizer, "M"), (args.out, "OUT")):
        if path:
            argv = [word.replace(path, name) if path in word.partition("=")[::2] else word for word in argv]
    return [Path(word).name if word == args.engines else word for word in argv]


def _pair(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or not url.startswith(("http://", "https://")):
        raise LightTransferError(f"--endpoint {text}: write NAME=http://host:port")
    return name, url


def _parser() -> Parser:
    parser = Parser(
        prog="lt-sglang eval",
        description="Ask full attention and lightened engines the same questions; say what lazy layers cost. "
        "Flags not named here go to SGLang, on all engines that are started.",
        epilog=EPILOG.format(conversations=", ".join(CONVERSATIONS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    engines = parser.add_mutually_exclusive_group(required=True)
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
    parser.add_argument("--suite", choices=(PROMPTS, TURNS), default=PROMPTS, help="single prompts (default)")
    parser.add_argument(
        "--cold", action="append", default=[], metavar="NAME", help="ask this engine without the cache too"
    )
    parser.add_argument("--limit-s", type=positive_float, help="seconds for each way to ask an engine")
    parser.add_argument(
        "--together", type=positive, default=1, help="engines of --suite conversations at a time, default 1"
    )
    parser.add_argument(
        "--samples-out", metavar="FILE.jsonl", help="write other conversations for calibrate; ask nothing"
    )
    parser.add_argument("--model-path", "--model", help="of engines that are started")
    parser.add_argument("--tokenizer", help="a folder or a hub name; the model's by default")
    parser.add_argument("--out", required=True, help="folder of report.json, table.txt and the figures")
    parser.add_argument(
        "--tasks", type=_tasks, help=f"some of {', '.join(TASKS)}, default passkey,3-key,text"
    )
    parser.add_argument(
        "--lengths",
        type=_numbers,
        default=(4096, 8192),
        help="prompt tokens, e.g. 4096,8192; answers take up to 128 more",
    )
    parser.add_argument("--trials", type=positive, default=30, help="a task and length, default 30")
    parser.add_argument(
        "--recent-tokens", type=positive, default=1020, help="keys are stated before the last of them"
    )
    parser.add_argument("--text", help="a text file: RULER's essays, and what perplexity and KL are of")
    parser.add_argument("--texts", type=positive, default=16, help="passages of the task text, default 16")
    parser.add_argument(
        "--continuation", type=positive, default=64, help="positions of the task text, default 64"
    )
    parser.add_argument("--top", type=positive, default=256, help="log-probabilities a position, default 256")
    parser.add_argument("--longbench", metavar="FOLDER", help="a local copy of LongBench: config/ and data/")
    parser.add_argument(
        "--longbench-tasks", type=_longbench, default=list(LONGBENCH), help=f"of {', '.join(LONGBENCH)}"
    )
    for name in MATH_METRICS:
        parser.add_argument(f"--{name}", metavar="FILE.jsonl", help="problems with their answers")
    parser.add_argument("--samples", type=positive, help="of each file; all by default")
    parser.add_argument("--math-tokens", type=positive, default=2048, help="new tokens, default 2048")
    parser.add_argument("--chat", action="store_true", help="use the chat template for files' questions")
    parser.add_argument(
        "--margin", type=share, default=DEFAULT_MARGIN, help="a loss one accepts, default 0.05"
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--clients", type=positive, default=8, help="requests at a time, default 8")
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="no figures")
    return parser


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


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))
