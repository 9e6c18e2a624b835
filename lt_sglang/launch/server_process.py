"""The one way to start a server: its port, its process, the wait until it is ready, the end of all of it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from lt_sglang.errors import LightTransferError
from lt_sglang.launch.processes import free_port, kill_tree, spawn
from lt_sglang.launch.ready import is_ready, say

LOG_LINES = 40
POLL_SECONDS = 0.5
SAY_SECONDS = 15.0


class ServerProcess:
    """One server.

    Args:
        name: how messages call it.
        log: the file its output goes to; None: where this process' output goes.
        port: where it listens; None: a free port.

    Attributes:
        failed: what ``wait_until_ready`` raises.
    """

    failed: type[Exception] = LightTransferError

    def __init__(self, name: str, log: Path | None, port: int | None = None) -> None:
        self.name = name
        self.log = log
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> None:
        """Start the process; ``cwd`` as for ``spawn``."""
        self._process = spawn(command, env, self.log, cwd)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    @property
    def pid(self) -> int:
        """Process id of the first process; the others are its descendants."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs. A scheduler that fails takes the process with it."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit code; None while it runs, negative if a signal ended it."""
        return None if self._process is None else self._process.poll()

    def processes(self) -> list[psutil.Process]:
        """Itself and all that it started, as they are now."""
        main = psutil.Process(self.pid)
        return [main, *main.children(recursive=True)]

    def ready(self) -> bool:
        """Whether it takes requests, and it is this process that listens."""
        return is_ready(self.url, self.pid)

    def wait_until_ready(self, seconds: float, tell: bool = False) -> None:
        """Return once it is ready; else end it and raise ``failed`` with the end of its log.

        Args:
            seconds: the longest wait.
            tell: say on stderr what is waited for, every 15 s.
        """
        began = said = time.monotonic()
        if tell:
            say(f"{self.name}: starting; its log is {self.log}")
        while not self.ready():
            now = time.monotonic()
            ended = not self.alive
            if ended or now - began > seconds:
                what = "it ended" if ended else f"not ready after {seconds:.0f} s"
                tail = self.log_tail()
                self.stop()
                raise self.failed(f"{self.name} did not start: {what}\n{tail}")
            if tell and now - said >= SAY_SECONDS:
                said = now
                say(f"{self.name}: still starting, {now - began:.0f} s")
            time.sleep(POLL_SECONDS)
        if tell:
            say(f"{self.name}: ready after {time.monotonic() - began:.0f} s")

    def stop(self, drain_seconds: float = 0.0) -> None:
        """End it and all its processes; does nothing if it is gone.

        drain_seconds: what runs may finish for so long.
        """
        if self._process is None:
            return
        if drain_seconds and self.alive:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(drain_seconds)
        kill_tree(self._process)
        self._process = None

    def log_text(self) -> str:
        """Everything it has printed; empty without a log."""
        return self.log.read_text("utf-8", "replace") if self.log is not None and self.log.exists() else ""

    def log_tail(self) -> str:
        """The end of its log."""
        return f"the end of {self.log}:\n" + "\n".join(self.log_text().splitlines()[-LOG_LINES:])
