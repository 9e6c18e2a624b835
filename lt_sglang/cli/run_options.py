"""The options of every command that starts servers and writes result files."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lt_sglang.cli.parser import Parser, iso_date, positive
from lt_sglang.config import CONFIG_KEY
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.model_config import names_folder, read_model_config
from lt_sglang.launch.options import LtOptions, resolve_config
from lt_sglang.launch.ready import say
from lt_sglang.planner.shapes import CONFIGS

if TYPE_CHECKING:
    from lt_sglang.bench.scenario import Scenario


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
        "--date",
        type=iso_date,
        default=datetime.date.today().isoformat(),
        help="of the result files, default today",
    )
    parser.add_argument("--note", action="append", default=[], help="for the result files; repeatable")


@contextmanager
def told_when_stopped(*places: Path) -> Iterator[None]:
    """Say where results are if Ctrl-C ends what runs."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped; what was measured so far is in {' and '.join(map(str, places))}")
        raise


def check_side(scenario: Scenario, model: str | None, options: LtOptions, gpu: bool) -> None:
    """Raise LightTransferError if our server could not start with ``scenario``, before any server does.

    model: --model-path. gpu: whether there is one.
    """
    engine = scenario.engine
    if model is None and engine.shape not in (None, "tiny") and not gpu:
        raise LightTransferError(
            f"{scenario.name}: the shape {engine.shape} needs a GPU; --rehearse tries the file without one"
        )
    if model is None:
        found = CONFIGS[engine.shape] if engine.shape is not None else None
    else:
        # Of a hub name, not known without asking the hub: SGLang does.
        found = read_model_config(model) if names_folder(model) else None
    if found is not None:
        overrides = {CONFIG_KEY: dict(engine.lighttransfer)} if engine.lighttransfer else {}
        resolve_config(options, model or str(engine.shape), found, overrides)
