"""What is made once per machine: where it lies, and how a folder appears whole. Standard library only."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def cache_home(env: Mapping[str, str] | None = None) -> Path:
    """Return the folder for everything that is built once per machine: ``$LT_SGLANG_HOME``.

    Defaults to ``~/.cache/lt-sglang``. It lies outside the source tree, so that several clones share one copy
    of the environment and of the demo model. The folder need not exist yet.
    """
    home = (os.environ if env is None else env).get("LT_SGLANG_HOME", "").strip()
    return Path(home).expanduser().absolute() if home else Path.home() / ".cache" / "lt-sglang"


def ensure_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Return the folder ``target``, made by ``fill`` in a scratch folder beside it if it is not there.

    It appears by a rename once it is complete, so concurrent callers and interrupted runs are safe.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        scratch.chmod(0o755)
        fill(scratch)
        try:
            scratch.rename(target)
        except OSError:
            # Another process finished first; anything else is a real failure.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
