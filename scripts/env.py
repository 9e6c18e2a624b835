"""The Python environment that the make targets use: one for all clones with the same lock files.

Usage: ``python scripts/env.py path | build``

``path`` prints where the environment belongs; ``build`` makes it there if need be. It is kept outside the
clone, in ``$LT_SGLANG_HOME`` (``~/.cache/lt-sglang`` by default), because it takes 11 GB, and is named after
the Python version and the lock files' content, so that a changed lock never meets an old environment.

A virtual environment cannot be moved, so it is built in its final place; the file ``.ready`` appears in it
last, and without that file it is not used. A lock lets concurrent builds wait for the first. Needs nothing
but the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lt_sglang.files import cache_home  # noqa: E402 - the clone is not installed in this interpreter

LOCK = ROOT / "requirements.lock"
NODEPS_LOCK = ROOT / "requirements-nodeps.lock"
READY = ".ready"
SUPPORTED = ((3, 11), (3, 12))
COMPILERS = ("cc", "gcc", "clang")
HEARTBEAT_SECONDS = 10.0
LOG_TAIL_LINES = 30
NEEDED_BYTES = 16 << 30  # the environment, and pip's downloads beside it


class BuildFailed(RuntimeError):
    """The environment could not be built; the message says what to do."""


def environment_path() -> Path:
    """Return the folder of the environment for this interpreter and these lock files."""
    content = LOCK.read_bytes() + NODEPS_LOCK.read_bytes()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache_home() / f"env-{version}-{hashlib.sha256(content).hexdigest()[:12]}"


def build() -> Path:
    """Return the environment's folder, building it first unless it is ready.

    Raises:
        BuildFailed: an unsupported Python, no C compiler, too little disk, or pip failed.
    """
    target = environment_path()
    if (target / READY).is_file():
        return target
    check_machine(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_builder(target) as guard:
        if (target / READY).is_file():  # built while this process waited
            return target
        started = time.monotonic()
        _say(f"building {target}: 11 GB, 5 to 15 minutes, once for this lock")
        shutil.rmtree(target, ignore_errors=True)  # left by an interrupted build
        log = target.with_name(target.name + ".log")
        _make_venv(target)
        _pip_install(target, log, guard)
        (target / READY).touch()
        _say(f"ready in {_clock(time.monotonic() - started)}")
        _mention_others(target)
    return target


def check_machine(home: Path) -> None:
    """Refuse early what would fail late.

    Raises:
        BuildFailed: with what is missing and how to get it.
    """
    if sys.version_info[:2] not in SUPPORTED:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise BuildFailed(
            f"SGLang 0.5.23 here needs Python {wanted}, and {sys.executable} is "
            f"{sys.version_info.major}.{sys.version_info.minor}. Name another: make PYTHON=python3.11 ..."
        )
    if not any(shutil.which(name) for name in COMPILERS):
        raise BuildFailed(
            "no C compiler (cc, gcc or clang) on the PATH; SGLang and Triton compile small files at "
            "start-up. On Debian or Ubuntu: apt-get install gcc libc6-dev"
        )
    existing = next(folder for folder in (home, *home.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < NEEDED_BYTES:
        raise BuildFailed(
            f"{existing} has {free >> 30} GiB free and the environment needs {NEEDED_BYTES >> 30}. "
            "Set LT_SGLANG_HOME to a folder on a larger disk."
        )


@contextlib.contextmanager
def only_builder(target: Path) -> Iterator[int]:
    """Hold ``target``'s build lock and yield its descriptor; wait, visibly, while another process has it."""
    with open(target.with_name(target.name + ".lock"), "w", encoding="utf-8") as file:
        started = shown = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - shown >= HEARTBEAT_SECONDS or shown == started:
                    shown = time.monotonic()
                    _say(f"waiting for another process that builds it ({_clock(shown - started)})")
                time.sleep(0.5)
        yield file.fileno()


def _make_venv(target: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "venv", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BuildFailed(
            f"{sys.executable} -m venv failed (Debian and Ubuntu keep it in a package of its own: "
            f"apt-get install python3-venv):\n{done.stdout.strip()}"
        )


def _pip_install(target: Path, log: Path, guard: int) -> None:
    command = [str(target / "bin" / "python"), "-m", "pip", "install"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    # The lock is complete, so there is nothing to resolve. Python compiles what it imports; compiling all of
    # the 11 GB at once would take longer than the first start does.
    command += ["--no-deps", "--no-compile", "--requirement", str(LOCK), "--requirement", str(NODEPS_LOCK)]
    total = sum(1 for file in (LOCK, NODEPS_LOCK) for line in file.read_text().splitlines() if "==" in line)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # Downloads go beside the packages: counted by the heartbeat, and gone with the folder if this is
    # interrupted.
    scratch = target / ".downloads"
    scratch.mkdir()
    env["TMPDIR"] = str(scratch)
    with log.open("w", encoding="utf-8") as output:
        # pip inherits the lock: should this process be killed, nobody else starts while pip goes on.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=target, pass_fds=(guard,)
        )
        with _stopped_with_us(process), heartbeat(target, log, total):
            code = process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
    if code != 0:
        tail = "\n".join(_lines(log)[-LOG_TAIL_LINES:])
        raise BuildFailed(f"pip failed; the end of {log}:\n{tail}")


@contextlib.contextmanager
def _stopped_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def heartbeat(target: Path, log: Path, total: int) -> Iterator[None]:
    """Print a line every few seconds on how far pip has come."""
    stop = threading.Event()
    started = time.monotonic()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            line = progress(_lines(log), total)
            _say(f"{_clock(time.monotonic() - started)}  {_megabytes(target)} MB on disk  {line}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def progress(lines: list[str], total: int) -> str:
    """Say what pip is doing, from its log so far."""
    if any(line.startswith("Installing collected packages") for line in lines):
        return f"unpacking {total} packages"
    # "Processing" is pip's word for a wheel that lies on this machine.
    collected = [line.split()[1] for line in lines if line.startswith(("Collecting ", "Processing "))]
    if not collected:
        return "starting"
    return f"fetching {len(collected)} of {total}: {collected[-1].rpartition('/')[2]}"


def _megabytes(folder: Path) -> int:
    size = 0
    pending = [str(folder)]
    while pending:
        # Files come and go while pip works.
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    size += entry.stat(follow_symlinks=False).st_size
    return size >> 20


def _mention_others(target: Path) -> None:
    prefix = target.name.rpartition("-")[0]
    others = [path for path in target.parent.glob(prefix + "-*") if path.is_dir() and path != target]
    if others:
        _say("of other locks, to be deleted if no clone uses them: " + " ".join(map(str, others)))


def _lines(log: Path) -> list[str]:
    with log.open(encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _say(text: str) -> None:
    print(f"env: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Run one of the two commands."""
    if arguments == ["path"]:
        print(environment_path())
        return 0
    if arguments != ["build"]:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        build()
    except BuildFailed as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted; the next run starts the build again")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
