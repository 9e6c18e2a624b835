"""Start a real SGLang server, stock or ours, with the same flags, and ask it about itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from lt_sglang.bench.capacity import server_info
from lt_sglang.bench.decode_log import Steady, steady_of
from lt_sglang.bench.held_server import HOLD_VARIABLE
from lt_sglang.config import CONFIG_KEY
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.admin import KEY_VARIABLE, admin_headers
from lt_sglang.launch.cpu import cpu_environment, cpu_server_args, has_gpu
from lt_sglang.launch.plan import plan_launch
from lt_sglang.launch.processes import free_port, kill_tree, spawn
from lt_sglang.launch.ready import is_ready

START_SECONDS = 1800.0
LOG_LINES = 25
# Steady decode is read from the log, the metrics from /metrics; without incremental output each event
# repeats everything before it, and 8K tokens of output would be gigabytes for the client to read.
COMMON_FLAGS = (
    *("--enable-metrics", "--decode-log-interval", "10", "--incremental-streaming-output"),
    *("--host", "127.0.0.1", "--random-seed", "1"),
)
STOCK = "stock"
LIGHTTRANSFER = "lighttransfer"


@dataclass(frozen=True)
class EngineSpec:
    """One server.

    side: stock or lighttransfer. backend: stock's attention backend. flags: of SGLang, without those of
    COMMON_FLAGS. lighttransfer: our configuration; options: ``--lt-*`` flags, which win over it.
    """

    side: str
    model: str
    tp: int
    flags: tuple[str, ...]
    backend: str = ""
    lighttransfer: Mapping[str, Any] | None = None
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What result files call it."""
        return f"{STOCK}_{self.backend}" if self.side == STOCK else LIGHTTRANSFER

    @property
    def key(self) -> str:
        """Equal for servers that are the same."""
        return json.dumps(
            [self.name, self.model, self.tp, self.flags, dict(self.lighttransfer or {}), self.options]
        )

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment; raises LightTransferError."""
        flags = [*COMMON_FLAGS, *self.flags, "--port", str(port), "--tp-size", str(self.tp)]
        if self.side == STOCK:
            return self._stock(flags)
        if self.lighttransfer:
            flags += ["--json-model-override-args", json.dumps({CONFIG_KEY: dict(self.lighttransfer)})]
        launch = plan_launch(["--model-path", self.model, *flags, *self.options], os.environ)
        return launch.command, launch.env

    def _stock(self, flags: list[str]) -> tuple[list[str], dict[str, str]]:
        # The plug-in does nothing unless its backend is asked for; stock is to be stock all the same.
        env = {**os.environ, "SGLANG_PLUGINS": "none"}
        if not has_gpu():
            flags = [*cpu_server_args(), *flags]
            env |= cpu_environment(self.tp, env)
        command = [sys.executable, "-m", "lt_sglang.launch.tied", "sglang.launch_server"]
        return [*command, "--model-path", self.model, "--attention-backend", self.backend, *flags], env


class Engine:
    """A running server; use it as a context manager.

    Args:
        spec: what to serve.
        log: its output.
        env: further environment variables.
        start_seconds: within which it must be ready.

    Attributes:
        admin_key: of SGLang's admin routes; None where they are open, as on stock servers.
    """

    def __init__(
        self,
        spec: EngineSpec,
        log: Path,
        env: Mapping[str, str] | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.spec = spec
        self._env = env or {}
        self._start_seconds = start_seconds
        self.log = log
        self._hold = log.with_suffix(".go")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin_key: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def hold(self) -> None:
        """Let it import in the background; it takes no GPU before it is entered."""
        self._hold.unlink(missing_ok=True)
        (python, *module), env = self.spec.command(self.port)
        command = [python, "-m", "lt_sglang.bench.held_server", *module[1:]]
        self._spawn(command, {**env, HOLD_VARIABLE: str(self._hold)})

    def __enter__(self) -> Engine:
        """Start it and wait until it generates; raises LightTransferError."""
        if self._process is None:
            self._spawn(*self.spec.command(self.port))
        self.release()
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def release(self) -> None:
        """Let a held engine go on, before it is entered."""
        self._hold.touch()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, with all its processes."""
        if self._process is not None:
            kill_tree(self._process)
            self._process = None
        self._hold.unlink(missing_ok=True)

    def _spawn(self, command: list[str], env: dict[str, str]) -> None:
        self.admin_key = env.get(KEY_VARIABLE) or None
        # In this folder, which the paths among the flags are relative to.
        self._process = spawn(command, {**env, **self._env}, self.log, cwd=Path.cwd())

    @property
    def pid(self) -> int:
        """Of the first process; the others are its descendants."""
        assert self._process is not None
        return self._process.pid

    def info(self) -> dict[str, Any]:
        """/server_info."""
        return server_info(self.url)

    def flush(self) -> None:
        """Empty the prefix cache, once the server is idle."""
        headers = admin_headers(self.admin_key)
        answer = requests.post(f"{self.url}/flush_cache", params={"timeout": 60}, headers=headers, timeout=90)
        answer.raise_for_status()

    def generates(self) -> bool:
        """Whether it answers with a token."""
        try:
            return requests.get(f"{self.url}/health_generate", timeout=30).status_code == 200
        except requests.RequestException:
            return False

    def log_position(self) -> int:
        """Where the log ends now, for ``steady_since``."""
        return self.log.stat().st_size

    def steady_since(self, position: int) -> Steady | None:
        """Steady decode in what was logged since ``position``."""
        with self.log.open("rb") as file:
            file.seek(position)
            return steady_of(file.read().decode("utf-8", "replace").splitlines())

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_seconds
        while not is_ready(self.url, self._process.pid):
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:])
                raise LightTransferError(f"{self.spec.name} did not start; the end of {self.log}:\n{tail}")
            time.sleep(0.5)
