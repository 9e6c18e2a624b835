"""A long run of mixed load on one server: it must stay as fast and as large as it was, and leak nothing."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lt_sglang.bench.machine import gpu_memory_mib
from lt_sglang.bench.outcome import read_samples
from lt_sglang.bench.runner import run_scenario
from lt_sglang.bench.scenario import Scenario
from lt_sglang.launch.engine import Engine

# Of half an hour, five minutes.
PARTS = 6
LEAST_SPEED = 0.97
# Allocators and caches fill in the first half; a leak goes on growing in the second.
MOST_GROWTH = 0.01
# Below this, caches still fill in the second half, and a part is a few requests.
ENOUGH_SECONDS = 600.0
WATCH_SECONDS = 2.0
IDLE_SECONDS = 60.0
# SGLang's own accounting of KV slots, each time it has nothing to do.
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
FAULTS = re.compile(
    r"leak detected|use-after-free|double free|Scheduler hit an exception|Traceback", re.IGNORECASE
)


@dataclass(frozen=True)
class Look:
    """at: time.time(). cpu_seconds, rss_mib: of all processes of the server. gpu_mib: of all its GPUs."""

    at: float
    cpu_seconds: float
    rss_mib: float
    gpu_mib: int


@dataclass(frozen=True)
class Part:
    """A sixth of the run: output tokens a second, and a second of CPU time; the largest memory seen."""

    tokens_per_second: float
    tokens_per_cpu_second: float
    rss_mib: float
    gpu_mib: int


class Watch:
    """Looks at a process tree every two seconds, in a thread, until it is left."""

    def __init__(self, pid: int) -> None:
        self._tree = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.looks: list[Look] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.looks.append(self._look())
            if self._done.wait(WATCH_SECONDS):
                return

    def _look(self) -> Look:
        cpu = rss = 0.0
        for process in (self._tree, *self._tree.children(recursive=True)):
            try:
                times = process.cpu_times()
                cpu += times.user + times.system
                rss += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return Look(time.time(), cpu, rss / 2**20, sum(gpu_memory_mib()))


def soak(scenario: Scenario, engine: Engine, out: Path) -> dict[str, Any]:
    """Run ``scenario`` on a running ``engine``; the figures, and under ``passed`` what held.

    Throughput is judged by the clock on a GPU. On a CPU the client and other work compete for the cores, so
    there it is judged by the server's own CPU time.
    """
    with Watch(engine.pid) as watch:
        data = run_scenario(scenario, engine.url, out, admin_key=engine.admin_key)
    found = parts(read_samples(out), watch.looks, data["started_at"], data["summary"]["duration"])
    left = leftovers(engine)
    summary = {name: value for name, value in data["summary"].items() if not name.endswith("_ms")}
    return {"summary": summary, **judge(found, all(gate["passed"] for gate in data["gates"]), left)}


def judge(found: Sequence[Part], gates_passed: bool, left: Sequence[str]) -> dict[str, Any]:
    """The parts of a run, what follows from them, and under ``passed`` what held."""
    on_gpu = found[-1].gpu_mib > 0
    speed = [one.tokens_per_second if on_gpu else one.tokens_per_cpu_second for one in found]
    memory = [one.gpu_mib + one.rss_mib for one in found]
    growth = memory[-1] / memory[PARTS // 2] - 1
    return {
        "parts": [asdict(one) for one in found],
        "last_over_first": round(speed[-1] / speed[0], 4),
        "memory_growth": round(growth, 4),
        "left": list(left),
        "passed": {
            "errors": gates_passed,
            "throughput": speed[-1] >= LEAST_SPEED * speed[0],
            "memory": growth <= MOST_GROWTH,
            "nothing_left": not left,
        },
    }


def told(found: Mapping[str, Any]) -> list[str]:
    """What ``soak`` found, a line a limit."""
    measured = {
        "errors": "no error, and every gate of the scenario",
        "throughput": f"last part over first {found['last_over_first']:.3f}, at least {LEAST_SPEED}",
        "memory": f"{found['memory_growth']:+.2%} from part 4 to 6, at most {MOST_GROWTH:.0%}",
        "nothing_left": f"idle, it holds nothing: {'; '.join(found['left']) or 'so it is'}",
    }
    return [
        f"{'PASS' if held else 'FAIL'} {name}: {measured[name]}" for name, held in found["passed"].items()
    ]


def parts(
    samples: Sequence[Mapping[str, str]], looks: Sequence[Look], started_at: float, seconds: float
) -> list[Part]:
    """The run in PARTS of equal length; a request's tokens are spread over the time it streamed."""
    edges = np.linspace(0.0, seconds, PARTS + 1)
    begins = np.array([float(row["start"]) + float(row["ttft"] or 0) for row in samples])
    ends = np.array([float(row["start"]) + float(row["e2e"]) for row in samples])
    tokens = np.array([float(row["output_tokens"]) for row in samples])
    # A request of one token ends where it begins.
    spans = np.maximum(ends - begins, 1e-6)
    at = np.array([look.at - started_at for look in looks])
    cpu = np.interp(edges, at, [look.cpu_seconds for look in looks])
    found = []
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = np.clip(np.minimum(begins + spans, high) - np.maximum(begins, low), 0, None) / spans
        made = float((tokens * inside).sum())
        seen = [look for look, when in zip(looks, at, strict=True) if low <= when <= high]
        found.append(
            Part(
                tokens_per_second=round(made / float(high - low), 2),
                tokens_per_cpu_second=round(made / max(1e-9, float(cpu[number + 1] - cpu[number])), 2),
                rss_mib=round(max((look.rss_mib for look in seen), default=0.0), 1),
                gpu_mib=max((look.gpu_mib for look in seen), default=0),
            )
        )
    return found


def leftovers(engine: Engine) -> list[str]:
    """What an idle server still holds, and faults it logged; nothing if all is well."""
    deadline = time.monotonic() + IDLE_SECONDS
    while (memory := _memory(engine)) and memory["sink_requests"] + memory["sink_sets_in_use"]:
        if time.monotonic() > deadline:
            return [f"requests still hold sink sets: {memory}"]
        time.sleep(0.5)
    engine.flush()
    found = []
    if not engine.generates():
        found.append("the server no longer answers")
    elif (memory := _memory(engine)) and memory["sink_sets_used"]:
        found.append(f"sink sets are in use in an empty server: {memory}")
    with engine.log.open(encoding="utf-8", errors="replace") as log:
        found += [line.strip()[:200] for line in log if FAULTS.search(line)][:5]
    return found


def _memory(engine: Engine) -> dict[str, Any] | None:
    state = engine.info()["internal_states"][0].get("lighttransfer")
    return state.get("memory") if state else None
