"""An engine that a command starts for itself: SGLang with lazy layers or without, on a port of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from lt_sglang.config import LightTransferConfig
from lt_sglang.launch.admin import KEY_VARIABLE, admin_headers
from lt_sglang.launch.held import HOLD_VARIABLE, MODULE
from lt_sglang.launch.plan import plan_launch, stock_command
from lt_sglang.launch.server_process import ServerProcess
from lt_sglang.launch.sglang_args import TP_SIZE, SglangArgs

# A 70B model from a network disk takes long; a server that is not ready by then has other problems.
START_SECONDS = 3600.0


@dataclass(frozen=True)
class EngineSpec:
    """An engine to start; equal specs are the same engine.

    name: of its results and its log. flags: SGLang's, without model, host and port. own: further ones, which
    engines compared with it do not have; with lazy layers also ``--lt-*``. stock: SGLang without the plug-in.
    """

    name: str
    model: str
    flags: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    stock: bool = False

    @property
    def tp(self) -> int:
        """Its tensor-parallel size."""
        return SglangArgs([*self.flags, *self.own]).get_int(TP_SIZE, 1)

    def config(self) -> LightTransferConfig | None:
        """Its configuration; None of stock, and of a model that cannot be read here."""
        return None if self.stock else plan_launch(self._argv(1), os.environ).config

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment; raises LightTransferError on a bad option."""
        argv = self._argv(port)
        if self.stock:
            return stock_command(argv, os.environ)
        launch = plan_launch(argv, os.environ)
        return launch.command, launch.env

    def _argv(self, port: int) -> list[str]:
        argv = ["--model-path", self.model, *self.flags, *self.own]
        return [*argv, "--host", "127.0.0.1", "--port", str(port)]


class Engine(ServerProcess):
    """A running engine; use it as a context manager.

    Args:
        spec: what to serve.
        log: its output.
        env: further environment variables.
        start_seconds: within which it must be ready.

    Attributes:
        admin_key: of SGLang's admin routes; None where they are open, as on stock servers.
    """

    log: Path

    def __init__(
        self,
        spec: EngineSpec,
        log: Path,
        env: Mapping[str, str] | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        super().__init__(spec.name, log)
        self.spec = spec
        self.admin_key: str | None = None
        self._env = env or {}
        self._start_seconds = start_seconds
        self._hold = log.with_suffix(".go")

    def hold(self) -> None:
        """Let it import in the background; it takes no GPU before it is entered."""
        self._hold.unlink(missing_ok=True)
        (python, _, *module), env = self.spec.command(self.port)
        self._spawn([python, "-m", MODULE, *module], {**env, HOLD_VARIABLE: str(self._hold)})

    def release(self) -> None:
        """Let a held engine go on, before it is entered."""
        self._hold.touch()

    def __enter__(self) -> Engine:
        """Start it and wait until it generates; raises LightTransferError."""
        if self._process is None:
            self._spawn(*self.spec.command(self.port))
        self.release()
        try:
            self.wait_until_ready(self._start_seconds, tell=True)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """End it, with all its processes."""
        super().stop(drain_seconds)
        self._hold.unlink(missing_ok=True)

    def _spawn(self, command: list[str], env: dict[str, str]) -> None:
        self.admin_key = env.get(KEY_VARIABLE) or None
        # In this folder, which the paths among the flags are relative to.
        self.start(command, {**env, **self._env}, cwd=Path.cwd())

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
        return generates(self.url)

    def log_position(self) -> int:
        """Where the log ends now, for ``log_since``."""
        return self.log.stat().st_size

    def log_since(self, position: int) -> list[str]:
        """The lines logged since ``position``."""
        with self.log.open("rb") as file:
            file.seek(position)
            return file.read().decode("utf-8", "replace").splitlines()


def server_info(url: str) -> dict[str, Any]:
    """/server_info of the server at ``url``; raises requests.RequestException."""
    answer = requests.get(f"{url}/server_info", timeout=60)
    answer.raise_for_status()
    data: dict[str, Any] = answer.json()
    return data


def generates(url: str, timeout: float = 30.0) -> bool:
    """Whether the server at ``url`` answers with a token."""
    try:
        return requests.get(f"{url}/health_generate", timeout=timeout).status_code == 200
    except requests.RequestException:
        return False
