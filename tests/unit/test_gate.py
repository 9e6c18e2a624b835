"""lt_sglang.launch.gate: who is answered before the server is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from lt_sglang.launch.gate import MESSAGE, WARM_UP_PATHS, PastTheGate, ReadyGate

TOKEN = "lt-warm-up-0123"


class Start:
    """What the gate asks."""

    def __init__(self) -> None:
        self.starting = True
        self.waits_for_weights = False


@pytest.fixture
def start() -> Start:
    return Start()


@pytest.fixture
def client(start: Start) -> Iterator[TestClient]:
    """An application that answers everything with the path it saw."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
    def echo(path: str, request: Request) -> dict[str, str]:
        return {"path": f"/{path}"}

    app.add_middleware(
        ReadyGate,
        starting=lambda: start.starting,
        waits_for_weights=lambda: start.waits_for_weights,
        token=TOKEN,
    )
    with TestClient(app) as made:
        yield made


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/generate"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/score"),
        ("PUT", "/encode"),
        ("POST", "/abort_request"),
        ("POST", "/pause_generation"),
        ("GET", "/flush_cache"),
        ("GET", "/release_memory_occupation"),
        ("POST", "/update_weights_from_disk"),
        ("GET", "/v1/responses/1"),
        ("POST", "/health"),
        ("GET", f"/{TOKEN}/pause_generation"),
        ("POST", f"/{TOKEN}/abort_request"),
        ("POST", f"/{TOKEN}x/generate"),
        ("POST", f"/x/{TOKEN}/generate"),
    ],
)
def test_work_is_refused_until_the_server_is_ready(
    client: TestClient, start: Start, method: str, path: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 503 and answer.json()["error"]["message"] == MESSAGE
    assert int(answer.headers["Retry-After"]) > 0
    start.starting = False
    answer = client.request(method, path)
    assert answer.status_code == 200 and answer.json() == {"path": path}


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/health_generate",
        "/ready",
        "/ping",
        "/metrics",
        "/model_info",
        "/v1/models",
        "/server_info",
    ],
)
def test_questions_are_answered(client: TestClient, path: str) -> None:
    assert client.get(path).json() == {"path": path}
    assert client.options("/generate").status_code == 200


def test_weights_reach_a_server_that_waits_for_them(client: TestClient, start: Start) -> None:
    assert client.post("/update_weights_from_ipc").status_code == 503
    start.waits_for_weights = True
    assert client.post("/update_weights_from_ipc").status_code == 200
    assert client.post("/generate").status_code == 503


@pytest.mark.parametrize("path", WARM_UP_PATHS)
def test_the_warm_up_gets_past(client: TestClient, path: str) -> None:
    class Args:
        ssl_certfile = "here"

        def url(self, port: int | None = None) -> str:
            return f"http://testserver:{port or 1}"

    args = PastTheGate(Args(), TOKEN)
    assert args.ssl_certfile == "here"
    assert args.url() == f"http://testserver:1/{TOKEN}"
    assert client.post(f"/{TOKEN}{path}").json() == {"path": path}


def test_under_a_root_path(start: Start) -> None:
    """uvicorn puts --fastapi-root-path in front of the path it was asked for."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])

    sent: list[Any] = []

    async def send(event: Any) -> None:
        sent.append(event)

    gate = ReadyGate(app, lambda: start.starting, lambda: False, TOKEN)

    def ask(kind: str, method: str, path: str) -> None:
        scope = {"type": kind, "method": method, "path": f"/api{path}", "root_path": "/api"}
        asyncio.run(gate(scope, None, send))  # type: ignore[arg-type]

    ask("http", "POST", f"/{TOKEN}/generate")
    ask("http", "GET", "/ready")
    assert seen == ["/api/generate", "/api/ready"] and not sent
    ask("http", "POST", "/generate")
    assert len(seen) == 2 and sent[0]["status"] == 503
    ask("websocket", "", "/v1/realtime")
    assert len(seen) == 2 and sent[-1] == {"type": "websocket.close", "code": 1013, "reason": MESSAGE}
    start.starting = False
    ask("websocket", "", "/v1/realtime")
    assert seen[-1] == "/api/v1/realtime"


def test_in_front_of_sglang_itself() -> None:
    """SGLang's own application and the hook that guards it; no engine behind them."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    from lt_sglang.hooks.wrappers import run_http_server

    class Manager:
        server_status = ServerStatus.Starting
        gracefully_exit = False

        def is_ready(self) -> bool:
            return self.server_status == ServerStatus.Up

    class Args:
        attention_backend = "lighttransfer"
        prefill_attention_backend = decode_attention_backend = None

        def url(self, port: int | None = None) -> str:
            return "http://testserver"

    manager: Any = Manager()
    served: Any = Args()
    warmed: list[str] = []
    before = list(http_server.app.user_middleware), http_server.get_global_state()

    def original(*args: Any, execute_warmup_func: Any, launch_callback: Any) -> str:
        assert args == (served, manager, "templates", "ports", ["info"], None) and launch_callback is None
        assert execute_warmup_func(Args())
        return "served"

    def warm_up(args: Any) -> bool:
        warmed.append(args.url())
        return True

    try:
        http_server.set_global_state(http_server._GlobalState(manager, None, {}))
        given = (served, manager, "templates", "ports", ["info"], None)
        done = run_http_server(original, *given, execute_warmup_func=warm_up, launch_callback=None)
        assert done == "served"
        client = TestClient(http_server.app, raise_server_exceptions=False)  # without its lifespan
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 503
        assert client.post("/generate", json={}).json()["error"]["message"] == MESSAGE
        own = warmed[0].removeprefix("http://testserver")
        # An empty body reaches SGLang's handler, and is not what it wants.
        answers = [client.post(f"{own}/generate", json={}), client.post(f"{own}/abort_request", json={})]
        assert answers[0].status_code != 503 and answers[1].status_code == 503
        manager.server_status = ServerStatus.Up
        assert client.get("/ready").status_code == 200
        assert client.post("/generate", json={}).status_code not in (404, 503)
        assert client.post(f"{own}/generate", json={}).status_code == 404, "it ends with the start"
    finally:
        http_server.app.user_middleware[:] = before[0]
        http_server.app.middleware_stack = None
        http_server.set_global_state(before[1])
