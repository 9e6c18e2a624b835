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

from lt_sglang.cli import eval_conversations, eval_suites
from lt_sglang.cli.eval_arms import arms
from lt_sglang.cli.eval_options import parser
from lt_sglang.cli.eval_suites import TURNS, build_questions
from lt_sglang.cli.preflight import check_engines
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.endpoint import Endpoint
from lt_sglang.eval.evaluate import Outcome, Questions, Row, ask, compare
from lt_sglang.eval.items import HfTokenizer
from lt_sglang.eval.plots import depth_heatmaps, require_matplotlib
from lt_sglang.eval.report import as_dict, markdown, table
from lt_sglang.launch.engine import Engine, EngineSpec
from lt_sglang.launch.processes import free_port
from lt_sglang.launch.ready import say


def run(argv: list[str]) -> int:
    """Print the table; writes report.json and the figures. Raises LightTransferError."""
    args, shared = parser().parse_known_args(argv)
    turns = args.suite == TURNS
    if args.plots and not turns:
        require_matplotlib()  # before hours of measuring
    if args.engines:
        args.engine = read_engines(Path(args.engines))
    if args.static and not args.shares:
        raise LightTransferError("--static: only with --shares")
    if args.shares:
        args.engine, shared = arms(args.shares, args.static, shared)
        if not args.static:
            say("--shares: dynamic mode alone; --static FILE.json adds static lists")
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
    eval_suites.check(args, names)


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
    """report.json, table.txt, table.md and the figures."""
    report = as_dict(vars(args), questions, outcomes, rows)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "table.txt").write_text(table(rows) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(rows) + "\n", encoding="utf-8")
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
