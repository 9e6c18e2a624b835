"""How many tests may run at once on this machine, and which must share a process."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

# A test process and the server it started: 6 GiB, two tensor-parallel ranks 8.
WORKER_MEMORY = 8 << 30
MOST_WORKERS = 8
CGROUP = Path("/sys/fs/cgroup")


def workers(cgroup: Path = CGROUP) -> int:
    """How many tests may run at once; 0: one, in pytest's own process."""
    most = min(cores(cgroup), memory(cgroup) // WORKER_MEMORY, MOST_WORKERS)
    return most if most > 1 else 0


def cores(cgroup: Path = CGROUP) -> int:
    """Cores this process may use, a container's limit included (version 2 of control groups)."""
    count = len(os.sched_getaffinity(0))
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    return min(count, max(int(quota) // int(period), 1)) if quota.isdigit() else count


def memory(cgroup: Path = CGROUP) -> int:
    """Bytes that are free now, of the machine and of a container's limit."""
    free = int(psutil.virtual_memory().available)
    limit = _read(cgroup / "memory.max")
    if not limit.isdigit():
        return free
    used = int(_read(cgroup / "memory.current") or 0)
    return min(free, max(int(limit) - used, 0))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
