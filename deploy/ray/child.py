"""SGLang's server as a child process: start it, ask it, end it. No Ray in here."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import partial

from lt_sglang.errors import LightTransferError
from lt_sglang.launch.lifeline import die_with
from lt_sglang.launch.ports import check_port, listens

POLL_SECONDS = 0.5
PORT_SECONDS = 20.0
STOP_SECONDS = 60.0  # SGLang looks for a signal every 5 s, and gives its schedulers time to end
FREE_PORTS = (20000, 29000)  # below those the kernel hands out


class EngineGone(RuntimeError):
    """The engine cannot take this request: it is ending, or has ended. Another one can."""


class Child:
    """One ``lt-sglang serve``.

    Args:
        arguments: of ``lt-sglang serve``, without host and port.
        port: where it listens.
        serves: False for the ranks of another node, which answer no requests.

    Raises:
        RuntimeError: the port is taken.
    """

    def __init__(self, arguments: Sequence[str], port: int, *, serves: bool = True) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        _wait_for_port(port)
        self._serves = serves
        command = [sys.executable, "-m", "lt_sglang", "serve", *arguments]
        command += ["--host=0.0.0.0", f"--port={port}", "--enable-metrics"]
        # A session of its own: a signal to the replica's group must not end the engine before it is drained.
        # Should the replica be killed, the kernel kills the engine, and SGLang's processes follow theirs.
        self._process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=partial(die_with, os.getpid())
        )

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the server process."""
        return self._process.pid

    def wait(self) -> None:
        """Return once the process has ended."""
        self._process.wait()

    def wait_until_ready(self, seconds: float) -> None:
        """Return once it serves; raises RuntimeError if it ends or takes longer."""
        deadline = time.monotonic() + seconds
        while not (self.ready() and self._is_ours()):
            if not self.alive:
                raise RuntimeError(
                    f"the engine ended with status {self._process.returncode}; its log is above"
                )
            if time.monotonic() > deadline:
                self.stop(0)
                raise RuntimeError(f"the engine was not ready after {seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def _is_ours(self) -> bool:
        """Whether it is this process that listens, and not one that took the port while it loaded."""
        return not self._serves or listens(self.pid, self._port)

    def ready(self, seconds: float = 5.0) -> bool:
        """Whether it takes requests. False from the moment it is told to end."""
        if not self._serves:
            return self.alive
        return self._answers("/ready", seconds)

    def generates(self, seconds: float = 25.0) -> bool:
        """Whether tokens come out: SGLang's own check, which waits up to 20 s for one."""
        return self._answers("/health_generate", seconds)

    def stop(self, drain_seconds: float) -> None:
        """Let what runs finish for so long, then end it and everything it started."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(drain_seconds + (STOP_SECONDS if drain_seconds else 0))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self, path: str, seconds: float) -> bool:
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(self.url + path, timeout=seconds) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False


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
    if gpus and gpus[0].isdecimal():
        return base + int(gpus[0])
    for port in random.sample(range(*FREE_PORTS), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port in {FREE_PORTS}")
