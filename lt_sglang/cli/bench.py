"""``lt-sglang bench``: stock SGLang against ours, on the same machine, with the same flags and traffic."""

from __future__ import annotations

import argparse
from pathlib import Path

from lt_sglang.bench import check_installed
from lt_sglang.cli.parser import Parser, positive, positive_float
from lt_sglang.cli.preflight import check_engines
from lt_sglang.cli.run_options import add_run_options, check_side, told_when_stopped
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.cpu import has_gpu
from lt_sglang.launch.options import OPTIONS_HELP, take_options

BACKENDS = ("flashinfer", "fa3", "triton", "torch_native")


def run(argv: list[str]) -> int:
    """Run the comparison; 1 if a scenario has no result or a gate of ours was broken."""
    options, rest = take_options(argv)
    args, flags = _parser().parse_known_args(rest)
    check_installed()
    from lt_sglang.bench.compare import Bench, Settings
    from lt_sglang.bench.machine import this_machine
    from lt_sglang.bench.rehearsal import RANKS, rehearsal
    from lt_sglang.bench.scenario_file import load_scenarios, pick_cases

    files = [file for path in args.scenarios for file in scenario_files(path)]
    groups = [list(found) for found in pick_cases([load_scenarios(file) for file in files], args.case)]
    if args.rehearse:
        groups = [[rehearsal(one, args.tp_size or RANKS) for one in group] for group in groups]
    # A server is started once for all scenarios of a group that need it; where time may run out, files are
    # finished one by one.
    if args.budget_s is None:
        groups = [[one for group in groups for one in group]]
    gpu = has_gpu()
    for one in (scenario for group in groups for scenario in group):
        check_side(one, args.model_path, options, gpu)
    settings = Settings(
        work=args.work,
        out=args.work / "rehearsal" if args.rehearse else args.out,
        date=args.date,
        machine=this_machine(),
        model=args.model_path,
        most_tp=args.tp_size,
        flags=tuple(flags),
        options=tuple(options.as_flags()),
        baselines=tuple(args.baseline or (["flashinfer"] if gpu else ["torch_native"])),
        rounds=args.rounds,
        repeats=args.repeats,
        budget_s=args.budget_s,
        limit_s=args.limit_s,
        overlap=args.overlap_starts,
        notes=tuple(args.note),
    )
    bench = Bench(settings)
    check_engines(bench.commands(groups))
    with told_when_stopped(settings.out, settings.work):
        code = bench.run(groups)
    if args.rehearse:
        print("This was a rehearsal: a tiny model and short lengths. Its ratios say nothing about a GPU.")
    return code


def scenario_files(path: Path) -> list[Path]:
    """A file itself, or the scenario files of a folder in order; raises LightTransferError."""
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.yaml"))
    if not files:
        raise LightTransferError(
            f"{path}: neither a scenario file nor a folder with *.yaml in it; SGLang's flags come after them"
        )
    return files


def _parser() -> Parser:
    parser = Parser(
        prog="lt-sglang bench",
        description="Compare stock SGLang with lazy layers: the same machine, flags and traffic. Flags not "
        "named here go to SGLang, on both sides.",
        epilog=OPTIONS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="+", type=Path, help="scenario files, or folders of them")
    parser.add_argument(
        "--case", action="append", default=[], help="only this case, of every file that has it; repeatable"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="a tiny model, short lengths, few requests and at most 2 ranks (or --tp-size): tries scenario "
        "files on a machine without GPUs; its figures mean nothing and go to the folder of --work",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        choices=BACKENDS,
        help="stock SGLang's attention backend; repeatable; default flashinfer, on a CPU torch_native",
    )
    parser.add_argument("--rounds", type=positive, default=2, help="starts of each server, default 2")
    parser.add_argument(
        "--repeats", type=positive, default=1, help="runs within a start, each with another seed, default 1"
    )
    parser.add_argument(
        "--budget-s",
        type=positive_float,
        help="start nothing more after so many seconds; files are then finished one by one",
    )
    parser.add_argument(
        "--limit-s",
        type=positive_float,
        default=3600.0,
        help="give up a server that is not ready, and a scenario that is not done, after so many seconds, "
        "default 3600",
    )
    parser.add_argument(
        "--overlap-starts",
        action="store_true",
        help="let the next server import while one starts; it takes the GPUs when that one has ended",
    )
    add_run_options(parser)
    return parser
