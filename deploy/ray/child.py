"""SGLang's server as a child process: start it, ask it, end it. No Ray in here."""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from lt_sglang.errors import LightTransferError
from lt_sglang.launch.ports import check_port
from lt_sglang.launch.processes import free_port
from lt_sglang.launch.server_process import ServerProcess

POLL_SECONDS = 0.5
PORT_SECONDS = 20.0
STOP_SECONDS = 60.0  # SGLang looks for a signal every 5 s, and gives its schedulers time to end
READY_SECONDS = 5.0
GENERATE_SECONDS = 25.0
# A proxy of the environment is not for this machine.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EngineGone(RuntimeError):
    """The engine cannot take this request: it is ending, or has ended. Another one can."""


class Child(ServerProcess):
    """One ``lt-sglang serve``.

    Should the replica be killed, the kernel kills the engine, and SGLang's processes follow theirs.

    Args:
        arguments: of ``lt-sglang serve``, without host and port.
        port: where it listens.
        serves: False for the ranks of another node, which answer no requests.

    Raises:
        RuntimeError: the port is taken.
    """

    failed = RuntimeError

    def __init__(self, arguments: Sequence[str], port: int, *, serves: bool = True) -> None:
        super().__init__("the engine", None, port)
        self._serves = serves
        _wait_for_port(port)
        command = [sys.executable, "-m", "lt_sglang", "serve", *arguments]
        self.start([*command, "--host=0.0.0.0", f"--port={port}", "--enable-metrics"], os.environ, Path.cwd())

    def wait(self) -> None:
        """Return once the process has ended."""
        self.process.wait()

    def log_tail(self) -> str:
        """Where its output is."""
        return f"status {self.exit_code}; its log is above"

    def ready(self) -> bool:
        """Whether it has started: it takes requests, and it is this process that listens."""
        return super().ready() if self._serves else self.alive

    def takes_requests(self) -> bool:
        """Whether it takes requests now; asked before each. False from the moment it is told to end."""
        return self._answers("/ready", READY_SECONDS) if self._serves else self.alive

    def generates(self) -> bool:
        """Whether tokens come out: SGLang's own check, which waits up to 20 s for one."""
        return self._answers("/health_generate", GENERATE_SECONDS)

    def _answers(self, path: str, seconds: float) -> bool:
        try:
            with DIRECT.open(self.url + path, timeout=seconds) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Let what runs finish for so long, then end it and everything it started."""
        super().stop(drain_seconds + STOP_SECONDS if drain_seconds else 0.0)


def _wait_for_port(port: int) -> None:
    """Return once ``port`` is free: the engine of the replica before this one may still be ending."""
    deadline = time.monotonic() + PORT_SECONDS
    while True:
        try:
            return check_port("0.0.0.0", port)
        except LightTransferError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(str(error)) from None
        time.sleep(POLL_SECONDS)


def choose_port(base: int, gpus: Sequence[str]) -> int:
    """``base`` plus the first GPU's number, which no other engine of the node has; else any free port."""
    return base + int(gpus[0]) if gpus and gpus[0].isdecimal() else free_port()
