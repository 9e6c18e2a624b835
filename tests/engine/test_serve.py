"""``lt-sglang serve`` as a process: taken ports, the admin key, and what is left of a killed one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import requests

from lt_sglang.launch.admin import KEY_VARIABLE
from lt_sglang.launch.processes import free_port, kill_tree, spawn
from lt_sglang.launch.ready import is_ready

from .environment import server_environment
from .models import ensure_model
from .server import START_TIMEOUT

pytestmark = pytest.mark.engine

KEY = "a-key-that-no-client-may-see"
ENDS_SECONDS = 5.0


def command(port: int, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "lt_sglang", "serve", str(ensure_model("llama")), "--lt-lazy-layers", "1-3"),
        *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "2000"),
        *("--mem-fraction-static", "0.1", "--skip-server-warmup", "--port", str(port), *flags),
    ]


def environment(**more: str) -> dict[str, str]:
    env = server_environment(extra=more)
    return env if KEY_VARIABLE in more else {k: v for k, v in env.items() if k != KEY_VARIABLE}


class Serve:
    """A ``lt-sglang serve`` that runs, and its log."""

    def __init__(self, folder: Path, *flags: str, **env: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.process = spawn(command(self.port, *flags), environment(**env), self.log)

    def wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not is_ready(self.url, self.process.pid):
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.3)

    def family(self) -> list[psutil.Process]:
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    server = Serve(tmp_path_factory.mktemp("serve"), **{KEY_VARIABLE: KEY})
    try:
        server.wait()
        yield server
    finally:
        kill_tree(server.process)


def test_a_taken_port_ends_the_start_at_once(tmp_path: Path) -> None:
    """Whoever holds it, and whatever it answers, nothing is loaded and nothing announced."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        began = time.monotonic()
        done = subprocess.run(command(port), env=environment(), cwd=tmp_path, capture_output=True, text=True)
    said = f"lt-sglang: --port {port}: process {os.getpid()} "
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert time.monotonic() - began < 20, "it imported SGLang"


def admin_routes() -> list[tuple[str, str]]:
    """Every route of SGLang's HTTP server that asks for the admin key: method, path."""
    spec = find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0], "srt/entrypoints/http_server.py").read_text()
    pattern = re.compile(
        r"^@app\.(\w+)\(\s*\"([^\"]+)\"([^)]*)\)\n@auth_level\(AuthLevel\.ADMIN", re.MULTILINE
    )
    routes = []
    for found in pattern.finditer(source):
        methods = re.findall(r"\"([A-Z]+)\"", found[3]) or [found[1].upper()]
        routes += [(method, found[2]) for method in methods]
    return routes


def test_no_admin_route_is_open(served: Serve) -> None:
    routes = admin_routes()
    assert len({path for _, path in routes}) >= 35 and ("POST", "/flush_cache") in routes
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {KEY}x"}):
        for method, path in routes:
            answer = requests.request(method, served.url + path, headers=headers, timeout=60)
            assert answer.status_code == 401, (method, path)
    key = {"Authorization": f"Bearer {KEY}"}
    assert requests.post(served.url + "/flush_cache", headers=key, timeout=60).status_code == 200


def test_clients_need_no_key(served: Serve) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
    answer = requests.post(served.url + "/generate", json=body, timeout=120)
    assert len(answer.json()["output_ids"]) == 3
    for path in ("/health", "/ready", "/server_info", "/v1/models"):
        assert requests.get(served.url + path, timeout=60).status_code == 200


def test_the_key_is_shown_to_nobody(served: Serve) -> None:
    """Stock SGLang answers /server_info with the server's keys, and asks for none to do so."""
    for path in ("/server_info", "/get_server_info"):
        text = requests.get(served.url + path, timeout=60).text
        assert '"admin_api_key":"<redacted>"' in text and KEY not in text
    assert KEY not in served.text()
    for process in served.family():
        assert KEY not in " ".join(process.cmdline()), process
        if process.pid != served.process.pid:
            assert KEY not in process.environ().values(), process


def test_it_says_when_it_is_ready(served: Serve) -> None:
    deadline = time.monotonic() + 30
    while "lt-sglang: ready after " not in served.text() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert f" s on {served.url}" in served.text()


def test_nothing_is_left_of_a_killed_server(served: Serve) -> None:
    """The last test of this server."""
    family = served.family()
    assert len(family) >= 3
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.wait(30)
    assert not left(family)


def left(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those of ``family`` that still run after ENDS_SECONDS."""
    _, alive = psutil.wait_procs(family[1:], ENDS_SECONDS)
    return [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_nothing_is_left_of_a_killed_start(how: signal.Signals, tmp_path: Path) -> None:
    """While SGLang's own processes import: they have not asked to end with their parent yet."""
    server = Serve(tmp_path)
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while len(workers := server_workers(server)) < 2:
            assert server.process.poll() is None and time.monotonic() < deadline, server.text()[-3000:]
            time.sleep(0.02)
        assert not any(one.name().startswith("sglang::") for one in workers), "too late to show anything"
        os.kill(server.process.pid, how)
        server.process.wait(60)
        assert not left([psutil.Process(), *workers])
    finally:
        kill_tree(server.process)


def server_workers(server: Serve) -> list[psutil.Process]:
    """Its scheduler and detokenizer, from the moment they are spawned."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if "--multiprocessing-fork" in process.cmdline() or process.name().startswith("sglang::"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
