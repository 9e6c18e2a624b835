"""What a result was measured on and with: GPU or CPU, commit, versions."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lt_sglang import __version__
from lt_sglang.names import HIDDEN

PACKAGES = {
    "sglang": "sglang",
    "torch": "torch",
    "flashinfer": "flashinfer-python",
    "triton": "triton",
    "locust": "locust",
    "transformers": "transformers",
    "kvpress": "kvpress",
}
COMMIT_VARIABLE = "LT_SGLANG_COMMIT"
# Flags whose value is left out of a command, and fields: of JSON, and of a URL.
SECRET_FLAG = re.compile(
    r"--[\w-]*(api-key|password|secret|watermark-key[\w-]*|watermark-config|extra-config)"
)
SECRET_FIELD = re.compile(
    r"""("[^"]*(?:key|password|secret|token)"\s*:\s*"|://)[^"/@\s]+(?="|@)""", re.IGNORECASE
)
# What contexts of processes that wait may hold on a GPU.
SLACK_MIB = 2048
# Part of what nvidia-smi calls it -> what lt-sglang plan calls it.
PLANNED = (("H200", "h200-141"), ("H100", "h100-80"), ("A100", "a100-80"))


@dataclass(frozen=True)
class Machine:
    """gpus: nvidia-smi's names; empty on a CPU.

    commit: LT_SGLANG_COMMIT, or the checkout's when the program started, with + after it where files were
    changed; unknown if the package is installed.
    """

    gpus: tuple[str, ...]
    driver: str
    cores: int
    processor: str
    commit: str = "unknown"

    @property
    def label(self) -> str:
        """For file names: h100, 4xh200, cpu."""
        if not self.gpus:
            return "cpu"
        name = self.gpus[0].replace("NVIDIA", "").split()[0].lower()
        return name if len(self.gpus) == 1 else f"{len(self.gpus)}x{name}"

    @property
    def planned_gpu(self) -> str | None:
        """The GPU's name in the planner; None if it does not know it."""
        if not self.gpus:
            return None
        return next((name for part, name in PLANNED if part in self.gpus[0]), None)

    def __str__(self) -> str:
        cores = f"{self.cores} CPU cores"
        if not self.gpus:
            return f"CPU only, {self.processor}, {cores}"
        count = f"{len(self.gpus)} x " if len(self.gpus) > 1 else ""
        return f"{count}{self.gpus[0]}, driver {self.driver}, {cores}"


def this_machine() -> Machine:
    """The machine this runs on."""
    rows = [line.split(",") for line in _nvidia_smi("name,driver_version") if "," in line]
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in _text(Path("/proc/cpuinfo")).splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    names = tuple(name.strip() for name, _ in rows)
    return Machine(names, rows[0][1].strip() if rows else "", os.cpu_count() or 1, processor, _commit())


def stamp(scenario: str, machine: Machine | None = None, seed: int = 0) -> dict[str, Any]:
    """What every result file begins with."""
    machine = machine or this_machine()
    return {
        "scenario": scenario,
        "hardware": str(machine),
        "versions": versions(),
        "commit": machine.commit,
        "seed": seed,
        "command": command_line(),
    }


def command_line() -> str:
    """The command that runs, as typed; keys and passwords are left out."""
    main = sys.modules["__main__"].__spec__
    if main is None:
        program = [Path(sys.argv[0]).name]
    else:
        program = ["lt-sglang"] if main.name == "lt_sglang.__main__" else ["python", "-m", main.name]
    return shlex.join([*program, *_without_secrets(sys.argv[1:])])


def _without_secrets(words: Sequence[str]) -> list[str]:
    """``words`` of a command line with HIDDEN in place of values of secret flags, also of flags in a word."""
    shown, hide = [], False
    for word in words:
        flag, equals, value = word.partition("=")
        secret = bool(SECRET_FLAG.fullmatch(flag))
        if hide:
            word = HIDDEN
        elif secret and equals:
            word = f"{flag}={HIDDEN}"
        elif word.startswith("-") and " " in flag:
            word = shlex.join(_without_secrets(_split(word)))
        elif equals and value.startswith("-"):
            word = f"{flag}={shlex.join(_without_secrets(_split(value)))}"
        hide = secret and not equals
        shown.append(SECRET_FIELD.sub(rf"\1{HIDDEN}", word))
    return shown


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quote without its end
        return text.split()


def versions() -> dict[str, str]:
    """Versions of what was measured and of what measured it."""
    found = {"lt-sglang": __version__}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found


def gpu_memory_mib() -> list[int]:
    """Memory in use on each GPU now; empty on a CPU."""
    return [int(line) for line in _nvidia_smi("memory.used")]


def wait_for_gpu_memory(idle_mib: Sequence[int], seconds: float = 20.0) -> None:
    """Until the memory in use is steady and near ``idle_mib``: an ended process gives it back late."""
    end, last = time.monotonic() + seconds, None
    while idle_mib and time.monotonic() < end:
        used = gpu_memory_mib()
        if used == last and all(now <= idle + SLACK_MIB for now, idle in zip(used, idle_mib, strict=True)):
            return
        last = used
        time.sleep(0.3)


def _nvidia_smi(fields: str) -> list[str]:
    """A line for each GPU of CUDA_VISIBLE_DEVICES; of another's, nothing that is measured here depends."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        if visible.strip() in ("", "-1"):
            return []
        query.append(f"--id={visible}")
    return _output(query).splitlines()


def _commit() -> str:
    # A copy of the sources without their history can be told.
    return os.environ.get(COMMIT_VARIABLE) or commit_of(Path(__file__).parent)


def commit_of(folder: Path) -> str:
    """The commit of a checkout, with + after it where files were changed; unknown without history."""
    head = _output(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]).strip()
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"]).strip()
    return f"{head}{'+' if changed else ''}" if head else "unknown"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
