"""The options of every command that starts servers and writes result files."""

from __future__ import annotations

import datetime
from pathlib import Path

from lt_sglang.cli.parser import Parser, positive


def add_run_options(parser: Parser) -> None:
    """Add them to ``parser``."""
    parser.add_argument("--model-path", "--model", help="a folder or hub name, in place of a shape")
    parser.add_argument("--tp-size", "--tp", type=positive, help="GPUs, where a scenario asks for more")
    parser.add_argument(
        "--out", type=Path, default=Path("loadtest/results"), help="result files, default loadtest/results"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("loadtest-out"), help="logs and reports, default loadtest-out"
    )
    parser.add_argument(
        "--date", default=datetime.date.today().isoformat(), help="of the result files, default today"
    )
    parser.add_argument("--note", action="append", default=[], help="for the result files; repeatable")
