"""Installed but not asked for, the plug-in changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from tempfile import TemporaryDirectory

import pytest

from .environment import server_environment
from .host import Host, Prompts
from .prompts import mixed_prompts
from .server import Reply, Server
from .specs import STOCK, STOCK_WITHOUT_PLUGIN
from .test_equal_stock import full_reference

pytestmark = pytest.mark.engine

REGISTER_SECONDS = 0.05

# What SGLang's launcher has imported when it loads plug-ins, then ours.
REGISTER = """
import json, sys, time
import sglang.srt.server_args
import sglang.srt.plugins
before = set(sys.modules)
start = time.perf_counter()
from lt_sglang.plugin import register
register()
seconds = time.perf_counter() - start
from sglang.srt.plugins.hook_registry import HookRegistry
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(set(sys.modules) - before),
    "hooks": sorted(HookRegistry._hooks),
}))
"""

# SGLang looks for plug-ins in the same way.
FIND_PLUGIN = """
import os
from importlib.metadata import entry_points
allowed = os.environ.get("SGLANG_PLUGINS")
found = {point.name for point in entry_points(group="sglang.srt.plugins")}
print("lighttransfer" in (found & set(allowed.split(",")) if allowed else found))
"""


@cache
def some_prompts() -> Prompts:
    """Up to 1,000 tokens."""
    return tuple(map(tuple, mixed_prompts(4, 60, 1000, 20, seed=31)))


def outputs(host: Host, name: str) -> list[Reply]:
    """One request after another on an empty cache: every batch is the same."""
    return host.outputs(name, some_prompts(), 32, clients=1)


@pytest.mark.served_by(STOCK)
def test_no_hook_is_applied(host: Host, server: Server) -> None:
    """A stock server with the plug-in beside it reports nothing of ours: no hook is in."""
    outputs(host, STOCK)
    assert "lighttransfer" not in server.info()["internal_states"][0]


@pytest.mark.served_by(STOCK_WITHOUT_PLUGIN)
def test_outputs_with_and_without_the_plugin(host: Host) -> None:
    """A stock server answers the same whether or not the plug-in is installed beside it."""
    stock, bare = outputs(host, STOCK), outputs(host, STOCK_WITHOUT_PLUGIN)
    full_reference().assert_same(some_prompts(), [r.tokens for r in stock], [r.tokens for r in bare])
    assert [(r.cached, r.finish, r.choice) for r in stock] == [(r.cached, r.finish, r.choice) for r in bare]
    assert _python(FIND_PLUGIN, plugin=True) == "True" and _python(FIND_PLUGIN, plugin=False) == "False"


def test_register_is_cheap() -> None:
    """Loading the plug-in takes no time to speak of, and none of the code that serves lazy layers."""
    report = json.loads(_python(REGISTER, plugin=True))
    serving = ("lt_sglang.attention", "lt_sglang.memory", "lt_sglang.model_runner", "lt_sglang.hooks")
    assert not [name for name in report["modules"] if name.startswith(serving)]
    assert report["hooks"] == []
    assert report["seconds"] < REGISTER_SECONDS, report


def _python(code: str, *, plugin: bool) -> str:
    """The last line a fresh interpreter prints."""
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=server_environment(plugin=plugin),
            cwd=folder,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]
