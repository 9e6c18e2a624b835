"""The pinned gateway as the chart starts it, before stand-ins for engines: keys, and how it spreads."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import requests

from lt_sglang.launch.processes import free_port, kill_tree, spawn

from ..http_server import serving
from .chart import container, one, template

pytestmark = pytest.mark.slow

ENGINES, PROMPTS = 4, 40
CLIENT, OPERATOR = "client-key", "operator-key"
WITH_KEYS = ("engine.apiKeySecret.name=keys", "adminKeySecret.name=operators")
# What changes the gateway or shows how it is made up; the answers are those of sglang-router 0.3.2.
ADMIN = (
    ("GET", "/workers"),
    ("POST", "/workers"),
    ("DELETE", "/workers/some-id"),
    ("POST", "/flush_cache"),
    ("GET", "/get_loads"),
    ("GET", "/wasm"),
    ("POST", "/wasm"),
    ("GET", "/v1/tokenizers"),
    ("POST", "/v1/tokenizers"),
)


def engine_handler() -> type[BaseHTTPRequestHandler]:
    """Answers what a gateway asks an engine, and counts completions in its class's ``served``."""

    class Engine(BaseHTTPRequestHandler):
        served = 0
        protocol_version = "HTTP/1.1"

        def _send(self, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._send({"model_path": "m", "served_model_name": "m", "tp_size": 1, "dp_size": 1})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            type(self).served += 1
            self._send({"text": "yes", "meta_info": {"finish_reason": {"type": "stop"}}})

        def log_message(self, *_: Any) -> None: ...

    return Engine


@contextmanager
def engines(count: int) -> Iterator[dict[str, Any]]:
    """By address, the handler's class; two at least, as the gateway's default policy wants of named ones."""
    with ExitStack() as stack:
        handlers = [engine_handler() for _ in range(count)]
        yield {stack.enter_context(serving(handler)): handler for handler in handlers}


@contextmanager
def gateway(path: Path, folder: Path, workers: Sequence[str], *sets: str) -> Iterator[str]:
    """The chart's container, run here; its address."""
    spec = container(one(template(*sets), "Deployment", "lt-sglang-gateway"))
    port = free_port()
    here = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--prometheus-host": "127.0.0.1",
        "--prometheus-port": str(free_port()),
    }
    keys = {"LT_API_KEY": CLIENT, "LT_ADMIN_KEY": OPERATOR}
    wanted = {item["name"] for item in spec.get("env", [])}
    env = {name: value for name, value in keys.items() if name in wanted}
    args, skipping = [], False
    for arg in spec["args"]:
        flag = arg.partition("=")[0]
        # Engines are named here; in a cluster they are found by their labels.
        skipping = flag == "--selector" or (skipping and not arg.startswith("--"))
        if skipping or flag.startswith("--service-discovery"):
            continue
        args.append(f"{flag}={here[flag]}" if flag in here else arg.replace("$(LT_API_KEY)", CLIENT))
    command = [*spec["command"], *args, "--worker-urls", *workers]
    path_variable = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    process = spawn(command, {"PYTHONPATH": str(path), "PATH": path_variable, **env}, folder / "log")
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _ready(url, len(workers)):
            running = process.poll() is None and time.monotonic() < deadline
            assert running, (folder / "log").read_text(errors="replace")[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        kill_tree(process)


def _ready(url: str, workers: int) -> bool:
    try:
        found = requests.get(f"{url}/readiness", timeout=2)
        return found.status_code == 200 and found.json().get("healthy_workers", workers) >= workers
    except requests.RequestException:
        return False


def status(url: str, method: str, route: str, key: str | None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"url": "http://127.0.0.1:9"}
    return requests.request(method, f"{url}{route}", json=body, headers=headers, timeout=10).status_code


def ask(url: str, rng: random.Random, key: str | None = None) -> int:
    text = "".join(chr(rng.randrange(97, 123)) for _ in range(300))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return requests.post(f"{url}/generate", json={"text": text}, headers=headers, timeout=30).status_code


def test_operators_alone_reach_the_admin_api(gateway_path: Path, tmp_path: Path) -> None:
    with engines(2) as urls, gateway(gateway_path, tmp_path, list(urls), *WITH_KEYS) as url:
        for method, route in ADMIN:
            assert status(url, method, route, None) == 401, route
            assert status(url, method, route, CLIENT) == 401, f"{route}: a client's key is no operator's"
            assert status(url, method, route, OPERATOR) not in (401, 403), route
        rng = random.Random(0)
        assert ask(url, rng, CLIENT) == 200 and ask(url, rng) == 401


def test_without_secrets_nobody_reaches_the_admin_api(gateway_path: Path, tmp_path: Path) -> None:
    """And everybody the model, which the chart allows inside a cluster only."""
    with engines(2) as urls, gateway(gateway_path, tmp_path, list(urls)) as url:
        for method, route in ADMIN:
            for key in (None, CLIENT, OPERATOR, ""):
                assert status(url, method, route, key) == 401, route
        assert ask(url, random.Random(0)) == 200


def test_unrelated_prompts_spread(gateway_path: Path, tmp_path: Path) -> None:
    """No engine gets more than 40 % of 40 unrelated prompts, one after another: median of 5 rounds."""
    with engines(ENGINES) as handlers, gateway(gateway_path, tmp_path, list(handlers)) as url:
        rng, most = random.Random(1), []
        for _ in range(5):
            before = {engine: handler.served for engine, handler in handlers.items()}
            assert {ask(url, rng) for _ in range(PROMPTS)} == {200}
            most.append(max(handler.served - before[engine] for engine, handler in handlers.items()))
    assert median(most) <= 0.4 * PROMPTS, most
