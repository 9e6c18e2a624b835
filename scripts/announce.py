"""Announce this clone's plug-in to Python, without installing the clone anywhere.

Usage: ``python scripts/announce.py``

SGLang finds plug-ins through installed packages' entry points. The environment is shared between clones, so
an editable install into it would point at whichever clone was installed last. Instead, each clone has a
folder ``.lt`` with the metadata that pip would have written; with the clone and that folder on PYTHONPATH,
Python sees lt-sglang as installed, and it is this clone's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def metadata_files(project: dict[str, Any]) -> dict[str, str]:
    """Return the contents of METADATA and entry_points.txt for pyproject's ``[project]`` table."""
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Requires-Python: {project['requires-python']}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
    groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    points = "\n".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in groups.items()
    )
    return {"METADATA": "\n".join(lines) + "\n", "entry_points.txt": points}


def announce(root: Path) -> Path:
    """Bring ``root/.lt`` up to date and return it; concurrent calls are safe."""
    with (root / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    folder = root / ".lt"
    name = f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    target = folder / name
    files = metadata_files(project)
    target.mkdir(parents=True, exist_ok=True)
    for file_name, text in files.items():
        path = target / file_name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            _replace(path, text)
    for other in folder.glob("*.dist-info"):
        if other.name != name:
            shutil.rmtree(other, ignore_errors=True)  # of an earlier version
    return folder


def _replace(path: Path, text: str) -> None:
    # By a rename: a server that starts meanwhile reads the old text or the new.
    handle, scratch = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(scratch, 0o644)
    os.replace(scratch, path)


if __name__ == "__main__":
    announce(ROOT)
