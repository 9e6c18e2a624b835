"""``lt-sglang loadtest``: a scenario's traffic to a running server."""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from lt_sglang.bench import check_installed
from lt_sglang.cli.parser import Parser, port, url
from lt_sglang.errors import LightTransferError

CONNECT_SECONDS = 10.0


def run(argv: list[str]) -> int:
    """Become locust; its exit code is 1 if a gate was broken, 2 if nothing could be measured."""
    args = _parser().parse_args(argv)
    check_installed()
    from lt_sglang.bench.runner import locust_command, locust_environment
    from lt_sglang.bench.scenario_file import load_scenarios, pick

    scenario = pick(load_scenarios(args.scenario), args.case)
    _check_reachable(args.url)
    command = locust_command(args.scenario, args.url, args.out, args.web_port)
    os.execve(command[0], [*command, "--lt-case", scenario.name], locust_environment())


def _check_reachable(address: str) -> None:
    """Raises LightTransferError if no connection can be made: locust would print empty tables beside that."""
    parts = urlsplit(address)
    place = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection(place, CONNECT_SECONDS).close()
    except OSError as error:
        raise LightTransferError(f"--url {address}: no connection ({error.strerror or error})") from None


def _parser() -> Parser:
    parser = Parser(
        prog="lt-sglang loadtest",
        description="Send a scenario's traffic to a running server and write what was measured.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", type=Path, help="a scenario file")
    parser.add_argument("--url", type=url, required=True, help="the server, e.g. http://127.0.0.1:30000")
    parser.add_argument("--case", help="which case of the file, if it has several")
    parser.add_argument(
        "--out", type=Path, default=Path("loadtest-out"), help="folder for the results, default loadtest-out"
    )
    parser.add_argument(
        "--web-port", type=port, help="start and watch runs on locust's page on this port of 127.0.0.1"
    )
    return parser
