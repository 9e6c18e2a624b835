"""Start and end a process with all its descendants, and find a port for it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

from lt_sglang.launch.lifeline import die_with

PORTS = (20000, 32000)


def spawn(
    command: Sequence[str], env: Mapping[str, str], log: Path | None, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, its output in ``log``; it dies with the thread that starts it.

    log: None leaves its output where this process' goes.

    So do the processes that it spawns, from their first line on, if its main module ties them
    (lt_sglang.cli.server does; lt_sglang.launch.tied runs any other so).

    Without ``cwd`` it runs in the log's folder, not in the checkout, where ``python -m`` would find the
    plug-in's code.
    """
    with contextlib.nullcontext() if log is None else log.open("wb") as out:
        return subprocess.Popen(
            command,
            cwd=cwd or (None if log is None else log.parent),
            env=env,
            stdout=out,
            stderr=None if log is None else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with, os.getpid()),
        )


def free_port() -> int:
    """A TCP port nothing listens on now.

    Below the range the kernel hands out by itself: a server takes its port half a minute later, and by then
    one of those may be some connection's end.
    """
    for port in random.sample(range(*PORTS), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port in {PORTS}")


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process started in a session of its own, and every descendant; reap it."""
    members = []
    with contextlib.suppress(psutil.NoSuchProcess):
        members = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(members, timeout=10)
