"""Tests run in several processes where the machine allows it (Makefile: ``-n auto --dist loadgroup``).

What shares a server or a module's fixtures stays in one process: a group. Groups that take long come first,
so that the processes end together.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from .workers import workers

# Groups in the order in which processes take them up, by duration on two cores; then other tests with
# engines, then the rest.
LONGEST_FIRST = (
    *("stock", "llama-reuse", "dynamic", "dynamic-first-chunk", "dynamic-churn", "dynamic-tp2"),
    *("dynamic-smollm2", "smollm2", "qwen2-tp2", "mistral", "qwen3", "qwen2", "qwen2_moe", "mixtral"),
    *("dynamic-list", "tests/loadtest/test_endpoint.py", "tests/deploy/test_docker.py"),
    *("interpreted_dynamic_backend.py", "interpreted_selection.py", "tests/deploy/test_manifests.py"),
    *("tests/deploy/test_monitoring.py", "tests/loadtest/test_ttft.py", "tests/contract/test_hooks.py"),
)
GROUPS = "lt_groups"


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker used here."""
    config.addinivalue_line("markers", "group(name): tests that must run in one process, in their order")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto`` means."""
    return workers()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell each process where to write the groups it finds, for the one that deals them out."""
    if not hasattr(node.config, GROUPS):
        setattr(node.config, GROUPS, Path(tempfile.mkdtemp(prefix="lt-test-groups-")) / "groups.json")
    node.workerinput[GROUPS] = str(getattr(node.config, GROUPS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out whole groups, in order.

    xdist 3.8 has this, but keeps groups in an attribute of tests that pytest 9.2 no longer reads: it deals
    out single tests and says nothing.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        """By the file that the processes wrote."""

        found: dict[str, str] = {}

        def _split_scope(self, nodeid: str) -> str:
            if not self.found:
                self.found.update(json.loads(Path(getattr(config, GROUPS)).read_text(encoding="utf-8")))
            return self.found[nodeid]

    config.option.loadscopereorder = False
    return Groups(config, log)


def in_several_processes(config: pytest.Config) -> bool:
    """Whether this is one of several processes that share the tests."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort by group where tests run in several processes."""
    if not in_several_processes(config):
        return
    items.sort(key=lambda item: (_rank(item), _server_position(item)))
    groups = {item.nodeid: _group(item) for item in items}
    file = Path(config.workerinput[GROUPS])  # type: ignore[attr-defined]
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(groups), encoding="utf-8")
    scratch.replace(file)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the seeds that tests recorded (``record_property("seed", n)``), passed or not."""
    seeds = sorted(
        f"seed {value}: {report.nodeid}"
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in getattr(report, "user_properties", [])
        if name == "seed" and report.when == "call"
    )
    if seeds:
        terminalreporter.write_sep("=", "seeds")
        terminalreporter.write_line("\n".join(seeds))


def _group(item: pytest.Item) -> str:
    """The marker's; else that of the server; else the module."""
    server = _marked(item, "served_by")
    if server:
        from .engine.specs import COMPARED

        return COMPARED[0] if server in COMPARED else server
    return _marked(item, "group") or item.nodeid.partition("::")[0]


def _rank(item: pytest.Item) -> int:
    group = _group(item)
    if group in LONGEST_FIRST:
        return LONGEST_FIRST.index(group)
    return len(LONGEST_FIRST) + (item.get_closest_marker("engine") is None)


def _server_position(item: pytest.Item) -> int:
    server = _marked(item, "served_by")
    if not server:
        return -1
    from .engine.specs import SERVERS

    return list(SERVERS).index(server)


def _marked(item: pytest.Item, name: str) -> str:
    """The argument of a marker; empty without it."""
    marker = item.get_closest_marker(name)
    return str(marker.args[0]) if marker else ""
