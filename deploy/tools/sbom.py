"""What the images install, as CycloneDX 1.6: ``python deploy/tools/sbom.py FOLDER``.

One file for each image's lock, made by cyclonedx-bom (fetch.py keeps it). Python's packages alone: what the
base images bring is in their publishers' own lists.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deploy.tools.fetch import FetchFailed, folder  # noqa: E402 - a script, not a package

LOCKS = {"lt-sglang": "engine.lock", "lt-sglang-gateway": "gateway.lock"}


def write(into: Path) -> list[Path]:
    """Write the files; raises FetchFailed or subprocess.CalledProcessError."""
    env = {**os.environ, "PYTHONPATH": str(folder("cyclonedx"))}
    into.mkdir(parents=True, exist_ok=True)
    files = []
    for image, lock in LOCKS.items():
        target = into / f"{image}.cdx.json"
        command = [
            sys.executable,
            "-m",
            "cyclonedx_py",
            "requirements",
            str(ROOT / "deploy" / "docker" / lock),
        ]
        command += ["--output-reproducible", "--output-format", "JSON", "--output-file", str(target)]
        subprocess.run(command, env=env, check=True)
        files.append(target)
    return files


def main(arguments: list[str]) -> int:
    """Write both files and name them."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        for file in write(Path(arguments[0])):
            print(file)
    except (FetchFailed, subprocess.CalledProcessError) as error:
        print(f"sbom: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
