"""``lt-sglang calibrate``: a static list of lazy layers, from samples of one's own traffic."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lt_sglang.cli.parser import Parser, positive, seed
from lt_sglang.cli.run_options import told_when_stopped
from lt_sglang.config import (
    CONFIG_KEY,
    DEFAULT_DECIDE,
    DEFAULT_KEEP,
    DEFAULT_LAST_QUERIES,
    DEFAULT_RECENT_TOKENS,
    DEFAULT_SCORE,
    DEFAULT_SINK_TOKENS,
    SCORES,
    LightTransferConfig,
    format_layers,
)
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.calibrate import (
    Choice,
    Journal,
    Setting,
    choose_layers,
    measure,
    read_samples,
    sha256_of,
)
from lt_sglang.eval.endpoint import Endpoint
from lt_sglang.eval.items import HfTokenizer
from lt_sglang.eval.plots import frequency_bars, require_matplotlib, score_heatmap
from lt_sglang.launch.cpu import has_gpu
from lt_sglang.launch.engine import Engine, EngineSpec
from lt_sglang.launch.options import OPTIONS_HELP, LtOptions, take_options

DESCRIPTION = """\
Prefill samples in dynamic mode, count how often each layer is among the laziest, and write the most frequent
ones as a configuration for lt-sglang serve --lt-config. A sample is a JSON line with "text", or "question"
and "answer"; it must be longer than sink + recent tokens to count. A run that was cut off goes on where it
stopped. Flags not named here go to SGLang.

With --greedy, layers are made lazy one by one, each time the one that then costs least on the samples' last
tokens; in transformers, on one device, no engine. A layer's cost is that of a list cut after the prompt
(--lt-mode dynamic --lt-score list); with --windows prefill, of a static list."""
DEFAULT_COMPARED = 32
WINDOWS = ("decode", "prefill")
JOURNAL_SUFFIX = ".samples.jsonl"


def run(argv: list[str]) -> int:
    """Write the configuration and the figures; raises LightTransferError."""
    options, rest = take_options(argv)
    args, flags = _parser().parse_known_args(rest)
    _check(options, args)
    if args.greedy:
        return _run_greedy(options, args, flags)
    for flag, value in (("--windows", args.windows), ("--candidates", args.candidates)):
        if value is not None:
            raise LightTransferError(f"{flag}: only with --greedy")
    if args.plots:
        require_matplotlib()  # before the engine starts
    score = options.score or DEFAULT_SCORE
    if score not in SCORES:
        raise LightTransferError(f"--lt-score {score}: finds no layers; one of {', '.join(SCORES)}")
    data, out = Path(args.data).expanduser(), Path(args.out)
    tokenizer = HfTokenizer(args.tokenizer or args.model_path)
    samples = read_samples(data, tokenizer, args.samples, args.max_tokens, args.seed)
    setting = Setting(
        model=Path(args.model_path).name,
        score=score,
        decide=options.decide or DEFAULT_DECIDE,
        sink_tokens=_or(options.sink_tokens, DEFAULT_SINK_TOKENS),
        recent_tokens=_or(options.recent_tokens, DEFAULT_RECENT_TOKENS),
        last_queries=_or(options.last_queries, DEFAULT_LAST_QUERIES),
        data_sha256=sha256_of(data),
        max_tokens=args.max_tokens,
    )
    window = setting.sink_tokens + setting.recent_tokens
    if all(len(sample.ids) <= window for sample in samples):
        raise LightTransferError(f"--data {data}: no sample is longer than sink + recent tokens ({window})")
    measured = Path(args.journal) if args.journal else out.with_name(out.name + JOURNAL_SUFFIX)
    journal = Journal(measured, setting)
    if any(sample.number not in journal.laziness for sample in samples) and not args.endpoint:
        words = _engine_options(options, score)
        device = ("--device", args.device) if args.device else ()
        spec = EngineSpec(out.stem, args.model_path, (*flags, *device), words)
        with told_when_stopped(measured), Engine(spec, out.with_suffix(".log")) as engine:
            endpoint = Endpoint(spec.name, engine.url, args.clients)
            laziness = measure(endpoint, samples, journal, _progress)
    else:
        endpoint = Endpoint("endpoint", args.endpoint or "", args.clients)
        if args.endpoint:
            check_endpoint(endpoint, setting)
        laziness = measure(endpoint, samples, journal, _progress)
    write(out, setting, laziness, options, args, len(samples))
    return 0


def _check(options: LtOptions, args: argparse.Namespace) -> None:
    """Raise LightTransferError for what would only come to light when all is measured, or be dropped."""
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise LightTransferError(f"--out {out}: must be a file in a folder that exists")
    for flag, value in (("--lt-config", options.config), ("--lt-lazy-layers", options.lazy_layers)):
        if value is not None:
            raise LightTransferError(f"{flag}: calibrate finds the lazy layers; leave it out")
    if options.mode == "static":
        raise LightTransferError("--lt-mode static: samples are measured in dynamic mode; leave it out")


def write(
    out: Path,
    setting: Setting,
    laziness: Sequence[Sequence[float]],
    options: LtOptions,
    args: argparse.Namespace,
    samples: int,
) -> Choice:
    """The configuration, with its evidence under a key of notes, and the figures beside it."""
    layers = len(laziness[0]) if laziness else 0
    keep = options.keep if options.keep is not None else DEFAULT_KEEP
    choice = choose_layers(laziness, keep if isinstance(keep, int) else round(keep * layers))
    config = LightTransferConfig(
        lazy_layers=choice.lazy_layers,
        sink_tokens=setting.sink_tokens,
        recent_tokens=setting.recent_tokens,
        source=f"calibrated by {setting.score} on {choice.samples} samples",
    )
    evidence = {
        **asdict(setting),
        "keep": keep,
        "seed": args.seed,
        "samples": choice.samples,
        "samples_too_short": samples - choice.samples,
        "lazy_in_samples": list(choice.counts),
        "mean_laziness": [round(value, 6) for value in choice.mean],
    }
    content = {CONFIG_KEY: {**config.to_dict(), "_calibration": evidence}}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: lazy layers {format_layers(choice.lazy_layers)}, from {choice.samples} samples")
    if samples > choice.samples:
        print(f"{samples - choice.samples} samples have at most sink + recent tokens and were not counted")
    if args.plots:
        score_heatmap(laziness, setting.score, out.with_suffix(".laziness.png"))
        frequency_bars(choice.counts, choice.samples, choice.lazy_layers, out.with_suffix(".frequency.png"))
    return choice


def _run_greedy(options: LtOptions, args: argparse.Namespace, engine: Sequence[str]) -> int:
    """``--greedy``; raises LightTransferError."""
    if args.endpoint:
        raise LightTransferError("--greedy: needs no server; leave out --endpoint")
    if options.score is not None:
        raise LightTransferError("--greedy: uses no score; leave out --lt-score")
    if engine:
        raise LightTransferError(f"--greedy: starts no engine; nothing reads {engine[0]}")
    from lt_sglang.eval.greedy import Costs, Windowed, greedy_order, load

    data, out = Path(args.data).expanduser(), Path(args.out)
    tokenizer = HfTokenizer(args.tokenizer or args.model_path)
    samples = read_samples(data, tokenizer, args.samples, args.max_tokens, args.seed)
    sink = _or(options.sink_tokens, DEFAULT_SINK_TOKENS)
    recent = _or(options.recent_tokens, DEFAULT_RECENT_TOKENS)
    device = args.device or ("cuda" if has_gpu() else "cpu")
    model = Windowed(load(str(Path(args.model_path).expanduser()), device), sink, recent)
    keep = options.keep if options.keep is not None else DEFAULT_KEEP
    count = keep if isinstance(keep, int) else round(keep * model.layers)
    if not 1 <= count < model.layers:
        can = f"1 to {model.layers - 1} can stay full"
        raise LightTransferError(f"--lt-keep: {count} of {model.layers} layers; {can}")
    windows, ids = args.windows or WINDOWS[0], [sample.ids for sample in samples]
    costs = Costs(model, ids, args.greedy, sink + recent, in_prefill=windows == "prefill")
    found = greedy_order(
        model.layers, costs, lambda steps: _progress(steps, len(steps), "layer"), args.candidates
    )
    lazy = found.lazy_layers(count)
    config = LightTransferConfig(
        lazy_layers=lazy,
        sink_tokens=sink,
        recent_tokens=recent,
        source=f"calibrated greedily on {costs.counted} samples, windows in {windows}",
    )
    evidence = {
        "model": Path(args.model_path).name,
        "method": "greedy",
        "data_sha256": sha256_of(data),
        "max_tokens": args.max_tokens,
        "compared": args.greedy,
        "windows": windows,
        "candidates": args.candidates,
        "keep": keep,
        "seed": args.seed,
        "samples": costs.counted,
        "samples_too_short": len(samples) - costs.counted,
        "lazy_layers": list(lazy),
        "order": list(found.order),
        "divergence": [round(value, 6) for value in found.divergence],
    }
    content = {CONFIG_KEY: {**config.to_dict(), "_calibration": evidence}}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    nats = found.divergence[len(lazy) - 1]
    told = f"lazy layers {format_layers(lazy)}, from {costs.counted} samples, at {nats:.4f} nats a position"
    print(f"{out}: {told}")
    return 0


def check_endpoint(endpoint: Endpoint, setting: Setting) -> None:
    """Raise LightTransferError unless the server decides as ``setting`` says."""
    told = endpoint.info()["lighttransfer"] or {}
    if told.get("mode") != "dynamic":
        raise LightTransferError("--endpoint: the server is not in dynamic mode (--lt-mode dynamic)")
    for name in ("score", "decide", "sink_tokens", "recent_tokens", "last_queries"):
        if told.get(name) != getattr(setting, name):
            flag = f"--lt-{name.replace('_', '-')}"
            raise LightTransferError(
                f"{flag}: the server at --endpoint has {told.get(name)!r}, not {getattr(setting, name)!r}"
            )


def _engine_options(options: LtOptions, score: str) -> tuple[str, ...]:
    """Dynamic mode as asked for."""
    return tuple(replace(options, mode="dynamic", score=score, lazy_layers=None).as_flags())


def _progress(results: Iterable[Any], count: int, unit: str = "batch") -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(results, desc="calibrate", total=count, unit=unit) if count else results


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _parser() -> Parser:
    parser = Parser(
        prog="lt-sglang calibrate",
        description=DESCRIPTION,
        epilog=OPTIONS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", "--model", required=True, help="the model, and its tokenizer")
    parser.add_argument("--tokenizer", help="another folder or hub name")
    parser.add_argument("--data", required=True, metavar="FILE.jsonl", help="samples")
    parser.add_argument("--out", required=True, metavar="FILE.json", help="the configuration")
    parser.add_argument(
        "--journal",
        metavar="FILE",
        help="samples measured so far (OUT.samples.jsonl); they serve any --lt-keep",
    )
    parser.add_argument("--endpoint", metavar="URL", help="a running server in dynamic mode")
    parser.add_argument(
        "--greedy",
        type=positive,
        nargs="?",
        const=DEFAULT_COMPARED,
        metavar="N",
        help=f"choose greedily, by the last N tokens of each sample (default {DEFAULT_COMPARED})",
    )
    parser.add_argument(
        "--windows",
        choices=WINDOWS,
        help="with --greedy: windows in lazy layers after the prompt only (decode, default) or in prefill",
    )
    parser.add_argument(
        "--candidates",
        type=positive,
        metavar="M",
        help="of --greedy: try M layers a step, those that added least when last tried; default all",
    )
    parser.add_argument("--device", help="cpu, cuda, ...; a GPU if there is one")
    parser.add_argument("--samples", type=positive, default=64, help="drawn from the file, default 64")
    parser.add_argument("--max-tokens", type=positive, default=8192, help="of a sample's end, default 8192")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--clients", type=positive, default=4, help="requests at a time, default 4")
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="no figures")
    return parser
