"""A server that cannot serve lazy layers as asked does not start: it says why and ends with an error.

It must never go on with full KV. Every case is a process of its own. Where one process runs all tests, they
are started up front, two at a time, and each test then looks at its own; elsewhere each test starts its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lt_sglang.launch.cpu import cpu_server_args
from lt_sglang.launch.processes import free_port, kill_tree, spawn
from tests.conftest import in_several_processes

from .environment import server_environment, write_plugin
from .models import ensure_model

pytestmark = pytest.mark.engine

TIMEOUT = 150.0
AT_ONCE = 2

# A second plug-in, loaded beside ours in every process: one of our hooks then cannot be applied.
SABOTEUR = """\
from sglang.srt.plugins.hook_registry import HookRegistry

def register():
    apply_target = HookRegistry._apply_target.__func__

    def fail(cls, target, hooks):
        if target.endswith({target!r}):
            raise RuntimeError("simulated: this hook cannot be applied")
        apply_target(cls, target, hooks)

    HookRegistry._apply_target = classmethod(fail)
"""


@dataclass(frozen=True)
class Case:
    """A server that must not start.

    says: what one line of its output must contain. hook: the end of the name of a hook that fails.
    """

    says: str
    lazy: Mapping[str, object] = field(default_factory=lambda: {"lazy_layers": "1-3"})
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    hook: str | None = None


CASES = {
    "layer-out-of-range": Case(
        "lazy_layers: layer 6 does not exist, the model has layers 0 to 5", lazy={"lazy_layers": "2,6"}
    ),
    "unknown-key": Case("lighttransfer.sinks: unknown key", lazy={"lazy_layers": "1", "sinks": 4}),
    "no-layers": Case("lighttransfer.lazy_layers: missing", lazy={"sink_tokens": 4}),
    "mixed-chunk": Case(
        "--enable-mixed-chunk: not supported with lazy layers", flags=("--enable-mixed-chunk",)
    ),
    "other-decode-backend": Case(
        "--decode-attention-backend torch_native", flags=("--decode-attention-backend", "torch_native")
    ),
    "dp-attention": Case(
        "--attn-dp-size 2: not supported with lazy layers",
        flags=("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
    ),
    "embedding-dynamic": Case(
        "--is-embedding: dynamic mode needs a model that generates",
        lazy={"mode": "dynamic", "keep": 3},
        flags=("--is-embedding",),
    ),
    "plugin-excluded": Case("invalid choice: 'lighttransfer'", env={"SGLANG_PLUGINS": "another"}),
    "runner-hook-missing": Case("hooks are not in place", hook="TpModelWorker._init_model_runner"),
    "checker-hook-missing": Case("_check_all_pools is not wrapped", hook="._check_all_pools"),
}


@dataclass(frozen=True)
class Ending:
    """How a server ended: exit status (None: killed after TIMEOUT), everything it printed, seconds."""

    status: int | None
    output: str
    seconds: float


@pytest.fixture(scope="module")
def ending_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Ending]]:
    """How a case ended."""
    wanted = [item.callspec.params["name"] for item in request.session.items if item.parent is request.node]
    if in_several_processes(request.config):
        yield lambda name: _run(CASES[name], tmp_path_factory.mktemp(name))
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        started = {name: pool.submit(_run, CASES[name], tmp_path_factory.mktemp(name)) for name in wanted}
        yield lambda name: started[name].result()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.group(f"fail-closed-{name}")) for name in CASES]
)
def test_server_does_not_start(name: str, ending_of: Callable[[str], Ending]) -> None:
    """Non-zero exit within TIMEOUT, one clear sentence, and no served request."""
    ending = ending_of(name)
    tail = ending.output[-4000:]
    assert ending.status is not None, f"still running after {TIMEOUT:.0f} s\n{tail}"
    assert ending.status != 0, tail
    assert CASES[name].says in ending.output, tail
    assert "The server is fired up" not in ending.output


def _run(case: Case, folder: Path) -> Ending:
    env = server_environment(extra=case.env)
    if case.hook is not None:
        _add_saboteur(folder, case.hook)
        env["PYTHONPATH"] = os.pathsep.join([str(folder), env["PYTHONPATH"]])
    command = [
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(ensure_model("llama"))),
        *cpu_server_args(),
        *("--attention-backend", "lighttransfer", "--dtype", "float32", "--mem-fraction-static", "0.1"),
        *("--json-model-override-args", json.dumps({"lighttransfer": dict(case.lazy)})),
        *("--host", "127.0.0.1", "--port", str(free_port()), "--max-total-tokens", "2000"),
        *case.flags,
    ]
    log = folder / "log"
    started = time.monotonic()
    process = spawn(command, env, log)
    try:
        status = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        status = None
    kill_tree(process)
    return Ending(status, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - started)


def _add_saboteur(folder: Path, target: str) -> None:
    write_plugin(folder, "saboteur", "saboteur:register")
    (folder / "saboteur.py").write_text(SABOTEUR.format(target=target), encoding="utf-8")
