"""SGLang engines without a server, side by side on one GPU, each a process with a time limit."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lt_sglang.bench.machine import stamp
from lt_sglang.launch.held import HOLD_VARIABLE
from lt_sglang.launch.processes import free_port, kill_tree, spawn

ROOT = Path(__file__).resolve().parents[2]


def engine_args(model: Path, **extra: Any) -> dict[str, Any]:
    """Keyword arguments of ``sglang.Engine``, the same for every engine of a comparison."""
    return {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "grammar_backend": "none",
        "random_seed": 1,
        "log_level": "info",
        **extra,
    }


def hybrid(sink: int, recent: int, **options: Any) -> dict[str, Any]:
    """Engine arguments with lazy layers of either mode; ``options`` are keys of the configuration."""
    config = {"sink_tokens": sink, "recent_tokens": recent, **options}
    return {
        "attention_backend": "lighttransfer",
        "json_model_override_args": json.dumps({"lighttransfer": config}),
    }


@dataclass(frozen=True)
class Step:
    """One engine: its name, keyword arguments, tasks (engine_job.py), limit in seconds, environment."""

    name: str
    engine: dict[str, Any]
    tasks: list[dict[str, Any]]
    limit_s: float
    env: dict[str, str] = field(default_factory=dict)


class Job:
    """An engine's process: it imports SGLang at once, and takes the GPU when ``run`` is called."""

    def __init__(self, step: Step, folder: Path) -> None:
        self.name = step.name
        self.log = folder / f"{step.name}.log"
        self._out, self._hold = (folder / f"{step.name}{suffix}" for suffix in (".json", ".go"))
        for file in (self._out, self._hold):
            file.unlink(missing_ok=True)
        # Engines that start side by side could otherwise choose the same free port.
        spec = {"engine": {"nccl_port": free_port(), **step.engine}, "tasks": step.tasks}
        (folder / f"{step.name}.spec").write_text(json.dumps(spec))
        command = [sys.executable, "-m", "loadtest.experiments.engine_job"]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, **step.env, HOLD_VARIABLE: str(self._hold)}
        self._process = spawn([*command, str(folder / f"{step.name}.spec"), str(self._out)], env, self.log)

    def run(self, limit_s: float) -> dict[str, Any] | None:
        """The result, or what it had measured when it failed or ran past ``limit_s`` seconds."""
        start = time.perf_counter()
        self._hold.touch()
        try:
            self._process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            print(f"{self.name}: past its limit of {limit_s:.0f} s", flush=True)
        finally:
            self.stop()
        print(f"{self.name}: exit {self._process.returncode} after {time.perf_counter() - start:.0f} s")
        if self._process.returncode != 0:
            lines = [line for line in self.log.read_text().splitlines() if "server_args=" not in line]
            print("\n".join(line[:300] for line in lines[-6:]), flush=True)
        return json.loads(self._out.read_text()) if self._out.exists() else None

    def stop(self) -> None:
        """End the process and all its children."""
        kill_tree(self._process)


class Run:
    """One run: its folder, its clock, its report.

    Attributes:
        report: the content of ``folder/report.json``, a result file: it has the machine, the versions, the
            commit and the command.
    """

    def __init__(self, folder: Path, budget_s: float, scenario: str, what: str) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + budget_s
        self.report = stamped(scenario, what)
        self.table: list[str] = []
        self._waiting: dict[str, Job] = {}

    def launch(self, steps: list[Step]) -> None:
        """Let the steps' engines import SGLang and wait for the GPU."""
        for step in steps:
            if step.name not in self._waiting:
                self._waiting[step.name] = Job(step, self.folder)

    def together(self, steps: list[Step], following: list[Step] | None = None) -> dict[str, dict[str, Any]]:
        """Results by name of engines that run side by side, of those that did all their tasks.

        following: engines that import meanwhile.
        """
        self.launch([*steps, *(following or ())])
        jobs = [self._waiting.pop(step.name) for step in steps]
        limit = min(max(step.limit_s for step in steps), self.deadline - time.monotonic())
        with ThreadPoolExecutor(len(steps)) as pool:
            results = list(pool.map(Job.run, jobs, itertools.repeat(max(limit, 1))))
        found = {}
        for step, result in zip(steps, results, strict=True):
            if result and len(result["tasks"]) == len(step.tasks):
                found[step.name] = result
            else:
                self.say(f"{step.name}: FAILED, see {self.folder / f'{step.name}.log'}")
        return found

    def close(self) -> None:
        """End every engine that still waits."""
        for job in self._waiting.values():
            job.stop()
        self._waiting.clear()

    def say(self, line: str) -> None:
        """Add a line to the table."""
        self.table.append(line)
        print(line, flush=True)

    def save(self) -> None:
        """Write the report."""
        (self.folder / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")


def stamped(scenario: str, what: str, **workload: Any) -> dict[str, Any]:
    """The beginning of an experiment's result: the machine, the versions, the command, what was measured."""
    return {**stamp(scenario), "workload": {"what": what, **workload}}
