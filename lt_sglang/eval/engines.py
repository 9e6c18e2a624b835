"""Engines that this command starts itself, one after the other."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.endpoint import Endpoint
from lt_sglang.launch.cpu import CompilerMissing, cpu_environment, cpu_server_args, has_gpu
from lt_sglang.launch.plan import plan_launch
from lt_sglang.launch.processes import free_port, kill_tree, spawn
from lt_sglang.launch.ready import is_ready
from lt_sglang.launch.sglang_args import TP_SIZE, SglangArgs

START_SECONDS = 3600.0
LOG_LINES = 20


@dataclass(frozen=True)
class EngineSpec:
    """An engine to start.

    name: of its row and its log. lt: its ``--lt-*`` options; None starts stock SGLang with full attention.
    flags: SGLang's, without model, host and port.
    """

    name: str
    model: str
    lt: tuple[str, ...] | None
    flags: tuple[str, ...] = ()

    def command(self, port: int, env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """The command line and the environment; raises LightTransferError on a bad option."""
        flags = ("--model-path", self.model, *self.flags, "--host", "127.0.0.1", "--port", str(port))
        if self.lt is not None:
            launch = plan_launch([*self.lt, *flags], env)
            return launch.command, launch.env
        on_cpu = not has_gpu()
        argv = [*flags]
        if on_cpu:
            argv += cpu_server_args()
            if "--attention-backend" not in flags:
                argv += ["--attention-backend", "torch_native"]
        try:
            tp = SglangArgs(list(flags)).get_int(TP_SIZE, 1)
            changes = cpu_environment(tp, env) if on_cpu else {}
        except CompilerMissing as error:
            raise LightTransferError(str(error)) from None
        command = [sys.executable, "-m", "lt_sglang.launch.tied", "sglang.launch_server"]
        return [*command, *argv], {**env, **changes}


@contextlib.contextmanager
def running(spec: EngineSpec, folder: Path, clients: int) -> Iterator[Endpoint]:
    """Start an engine, wait until it is ready, and end it; its log is ``folder/NAME.log``.

    Raises LightTransferError with the end of the log if it ends before it is ready.
    """
    port = free_port()
    command, env = spec.command(port, os.environ)
    log = folder / f"{spec.name}.log"
    url = f"http://127.0.0.1:{port}"
    # In this folder, which the paths among the flags are relative to.
    process = spawn(command, env, log, cwd=Path.cwd())
    try:
        end = time.monotonic() + START_SECONDS
        while not is_ready(url, process.pid):
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                raise LightTransferError(
                    f"{spec.name}: the engine did not start; {log} ends: {' | '.join(tail)}"
                )
            time.sleep(1)
        yield Endpoint(spec.name, url, clients)
    finally:
        kill_tree(process)
