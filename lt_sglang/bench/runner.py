"""Run locust on a scenario, headless, in a process of its own: it patches the whole of Python's I/O."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from lt_sglang.bench import locustfile_path
from lt_sglang.bench.outcome import SUMMARY, read_summary
from lt_sglang.bench.scenario import Scenario
from lt_sglang.bench.scenario_file import as_mapping
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.admin import KEY_VARIABLE

SCENARIO = "scenario.yaml"
# Of a log without an error.
LOG_LINES = 3
# [time] host/LEVEL/logger: message
_ERROR = re.compile(r"\[[^]]*\] \S+/(?:ERROR|CRITICAL)/[^:]*: (.*)")


def locust_command(file: Path, url: str, out: Path, web_port: int | None = None) -> list[str]:
    """locust with our file; headless, or with its page on ``web_port``."""
    command = [sys.executable, "-m", "locust", "-f", str(locustfile_path()), "--host", url]
    command += ["--lt-scenario", str(file), "--lt-out", str(out)]
    if web_port is not None:
        return [*command, "--web-host", "127.0.0.1", "--web-port", str(web_port)]
    # Into a file: its table counts warm-up and first tokens as requests, and stands beside ours otherwise.
    return [*command, "--headless", "--only-summary", "--json-file", str(out / "locust")]


def locust_environment() -> dict[str, str]:
    """Loaded by its path, the file must still find its package."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


def run_scenario(
    scenario: Scenario, url: str, out: Path, limit_s: float | None = None, admin_key: str | None = None
) -> dict[str, Any]:
    """summary.json of a run against ``url``; raises LightTransferError if there is none after ``limit_s``.

    admin_key: of the server, for scenarios that abort requests by their ids.
    Broken gates are in the summary, and no error here. Paths of traces must be absolute.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / SCENARIO
    file.write_text(yaml.safe_dump(as_mapping(scenario), sort_keys=False), encoding="utf-8")
    (out / SUMMARY).unlink(missing_ok=True)
    log = out / "locust.log"
    command = locust_command(file, url, out)
    try:
        with log.open("wb") as output:
            subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=locust_environment() | ({KEY_VARIABLE: admin_key} if admin_key else {}),
                timeout=limit_s,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise LightTransferError(f"{scenario.name}: not done after {limit_s:.0f} s; see {log}") from None
    if not (out / SUMMARY).is_file():
        raise LightTransferError(f"{scenario.name}: locust measured nothing: {_reason(log)}; see {log}")
    return read_summary(out)


def _reason(log: Path) -> str:
    """The last error in locust's log; its end if there is none."""
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [found[1] for found in map(_ERROR.match, lines) if found]
    return errors[-1] if errors else " ".join(lines[-LOG_LINES:])
