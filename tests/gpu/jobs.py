"""Run engine jobs with time limits and read SGLang's own decode log lines."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_AVAILABLE = re.compile(r"Load weight begin\. avail mem=([0-9.]+) GB")


class Job:
    """An engine job: ``Job(...)`` imports SGLang in the background, ``run`` lets it use the GPU.

    Importing takes half a minute, so a sequence of jobs is faster if the next ones are made before this
    one runs.
    """

    # Runs on different GPUs of a machine each take a range of their own.
    _port = itertools.count(20000 + os.getpid() % 1000 * 10)

    def __init__(self, name: str, spec: dict[str, Any], folder: Path, env: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log = folder / f"{name}.log"
        self._out = folder / f"{name}.json"
        self._out.unlink(missing_ok=True)
        self._gate = folder / f"{name}.gate"
        self._gate.unlink(missing_ok=True)
        # Engines that start side by side could otherwise choose the same free port.
        spec = {**spec, "engine": {"nccl_port": next(Job._port), **spec["engine"]}}
        spec_file = folder / f"{name}.spec"
        spec_file.write_text(json.dumps(spec))
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "engine_job.py"), str(spec_file), str(self._out)],
                env={**os.environ, **env, "LT_GATE": str(self._gate)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, limit_s: float) -> dict[str, Any] | None:
        """The result, or what it had measured when it failed or ran past ``limit_s`` seconds."""
        start = time.perf_counter()
        self._gate.touch()
        try:
            self._process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            print(f"{self.name}: past its limit of {limit_s:.0f} s", flush=True)
        finally:
            self.stop()
        print(
            f"{self.name}: exit {self._process.returncode} after {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if self._process.returncode != 0:
            lines = [line for line in self.log.read_text().splitlines() if "server_args=" not in line]
            print("\n".join(line[:300] for line in lines[-6:]), flush=True)
        return json.loads(self._out.read_text()) if self._out.exists() else None

    def stop(self) -> None:
        """End the process and all its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def gpu_used_mib(wait_s: float = 20.0) -> int | None:
    """Memory in use on the fullest visible GPU once it stops falling; an ended engine gives it back late."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    only = ["-i", visible] if visible else []
    used: list[int] = []
    end = time.monotonic() + wait_s
    while len(used) < 2 or (used[-1] != used[-2] or used[-1] > 8000) and time.monotonic() < end:
        if used:
            time.sleep(0.5)
        command = ["nvidia-smi", *only, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        used.append(max(map(int, done.stdout.split())))
    return used[-1]


def available_gb(log: str) -> float | None:
    """What SGLang found free on the GPU before it loaded the weights: the same for engines compared."""
    found = _AVAILABLE.search(log)
    return float(found[1]) if found else None


def task_logs(log: str) -> list[list[str]]:
    """The log lines of each task of a job, in order."""
    tasks: list[list[str]] = []
    current: list[str] | None = None
    for line in log.splitlines():
        if line.startswith("TASK END"):
            current = None
        elif line.startswith("TASK "):
            current = []
            tasks.append(current)
        elif current is not None:
            current.append(line)
    return tasks
