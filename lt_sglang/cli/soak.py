"""``lt-sglang soak``: a long run of mixed load on a server with lazy layers."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lt_sglang.bench import check_installed
from lt_sglang.cli.parser import Parser, positive_float
from lt_sglang.cli.run_options import add_run_options, check_side, told_when_stopped
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.cpu import has_gpu
from lt_sglang.launch.options import OPTIONS_HELP, take_options
from lt_sglang.launch.ready import say


def run(argv: list[str]) -> int:
    """Start a server, load it, write the result file; 1 if something did not hold."""
    options, rest = take_options(argv)
    args, flags = _parser().parse_known_args(rest)
    check_installed()
    from lt_sglang.bench.machine import this_machine
    from lt_sglang.bench.result_file import header, write
    from lt_sglang.bench.scenario_file import load_scenarios, pick
    from lt_sglang.bench.servers import LIGHTTRANSFER, specs_of
    from lt_sglang.bench.soak import STRICT, soak, told
    from lt_sglang.launch.engine import Engine

    scenario = pick(load_scenarios(args.scenario), args.case)
    if args.seconds is not None:
        scenario = replace(scenario, load=replace(scenario.load, seconds=args.seconds))
    if not scenario.load.seconds:
        raise LightTransferError(f"{scenario.name}: load.seconds: missing; give --seconds")
    check_side(scenario, args.model_path, options, has_gpu())
    machine = this_machine()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    spec = specs_of(
        scenario, work, (), args.model_path, args.tp_size, tuple(flags), tuple(options.as_flags())
    )[LIGHTTRANSFER]
    warn_if_short(scenario.load.seconds)
    with told_when_stopped(work), Engine(spec, work / "soak.log", STRICT) as engine:
        say(f"{scenario.name}: {scenario.load.seconds:.0f} s of load; {work / scenario.name / 'locust.log'}")
        found = soak(scenario, engine, work / scenario.name)
    result = {**header(scenario, machine, spec), "soak": found, "notes": args.note}
    if not scenario.name.startswith("soak"):
        result["scenario"] = f"soak-{scenario.name}"  # bench's result has its name
    print(write(result, args.out, args.date, machine.label))
    print("\n".join(told(found)))
    warn_if_short(scenario.load.seconds)
    return int(not all(found["passed"].values()))


def warn_if_short(seconds: float) -> None:
    """Say so if a run of ``seconds`` cannot judge speed and memory."""
    from lt_sglang.bench.soak import ENOUGH_SECONDS

    if seconds < ENOUGH_SECONDS:
        say(
            f"{seconds:g} s are too short to judge throughput and memory, either way; "
            f"take {ENOUGH_SECONDS:.0f} s or more (half an hour: --seconds 1800)"
        )


def _parser() -> Parser:
    parser = Parser(
        prog="lt-sglang soak",
        description="Load a server with lazy layers for a long time: it must stay as fast and as large as it "
        "was, and hold nothing when it is idle again. Flags not named here go to SGLang.",
        epilog=OPTIONS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", type=Path, help="a scenario file with load.seconds")
    parser.add_argument("--case", help="which case of the file")
    parser.add_argument("--seconds", type=positive_float, help="instead of the scenario's load.seconds")
    add_run_options(parser)
    return parser
