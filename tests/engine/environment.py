"""The environment of a server process: a CPU engine, SGLang's strict checks, the plug-in or not."""

from __future__ import annotations

import os
import site
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from lt_sglang.files import cache_home
from lt_sglang.launch.cpu import cpu_environment

REPOSITORY = Path(__file__).resolve().parents[2]
GROUP = "sglang.srt.plugins"
PLUGIN = "lighttransfer"

# Every check SGLang 0.5.23 has of its own memory accounting. A fault ends the scheduler, and with it the
# server: "the server still answers" is the assertion.
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_INVARIANT_CHECK": "2",
    "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
}


def server_environment(
    *, tp: int = 1, plugin: bool = True, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What a server process is started with.

    Args:
        tp: tensor-parallel size.
        plugin: whether SGLang finds the plug-in.
        extra: set last; wins.
    """
    base = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **STRICT}
    for name in ("SGLANG_PLUGINS", "LT_SGLANG_ACTIVE", "SGLANG_CPU_OMP_THREADS_BIND"):
        base.pop(name, None)
    base |= cpu_environment(tp=tp, base=base)
    base |= python_path(base.get("PYTHONPATH", ""), plugin=plugin)
    return {**base, **(extra or {})}


def python_path(current: str, *, plugin: bool) -> dict[str, str]:
    """PYTHONPATH with or without the plug-in, and SGLANG_PLUGINS where it is installed for good."""
    entries = [entry for entry in current.split(os.pathsep) if entry]
    installed = any(_offers_plugin(entry) for entry in site.getsitepackages())
    if plugin:
        if not installed and not any(_offers_plugin(entry) for entry in entries):
            # A checkout that was not installed.
            entries.insert(
                0, str(write_plugin(cache_home() / "test-plugin", PLUGIN, "lt_sglang.plugin:register"))
            )
        if str(REPOSITORY) not in entries:
            entries.insert(0, str(REPOSITORY))
        return {"PYTHONPATH": os.pathsep.join(entries)}
    kept = [e for e in entries if not _offers_plugin(e) and not (Path(e) / "lt_sglang").is_dir()]
    changes = {"PYTHONPATH": os.pathsep.join(kept)}
    if installed:
        changes["SGLANG_PLUGINS"] = "none"  # an allow-list: SGLang then loads no plug-in's code
    return changes


def _offers_plugin(folder: str) -> bool:
    return any(
        point.group == GROUP and point.name == PLUGIN
        for distribution in distributions(path=[folder])
        for point in distribution.entry_points
    )


def write_plugin(folder: Path, name: str, target: str) -> Path:
    """Announce a plug-in of SGLang in ``folder``, as an installed package would; returns ``folder``."""
    metadata = folder / f"{name}_test-0.0.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-test\nVersion: 0.0.0\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {target}\n")
    return folder
