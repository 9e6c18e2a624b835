"""What has to be in place before SGLang starts: caches, and the environment of a machine without a GPU.

Nothing here imports torch or sglang, so it can run in a launcher that then re-executes itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["cache_home"]


def cache_home(env: Mapping[str, str] | None = None) -> Path:
    """Return the folder for everything that is built once per machine: ``$LT_SGLANG_HOME``.

    Defaults to ``~/.cache/lt-sglang``. It lies outside the source tree, so that several clones share one copy
    of the environment and of the demo model. The folder need not exist yet.
    """
    home = (os.environ if env is None else env).get("LT_SGLANG_HOME", "").strip()
    return Path(home).expanduser().absolute() if home else Path.home() / ".cache" / "lt-sglang"
