"""Admin routes are known as such, and admin calls that would end the server are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from sglang.srt.utils import auth

from lt_sglang.guard import hooks

LEVEL = auth._get_auth_level_from_app_and_scope
STOCK_LEVEL = getattr(LEVEL, "__wrapped__", LEVEL)


def application() -> FastAPI:
    """An admin route and a client's, each of the application itself and of a router in a router."""
    inner, outer, app = APIRouter(), APIRouter(), FastAPI()

    @auth.auth_level(auth.AuthLevel.ADMIN_OPTIONAL)
    def admin() -> None: ...

    def client() -> None: ...

    for where, prefix in ((app, "/own"), (inner, "/router")):
        where.get(prefix + "/admin/{name}")(admin)
        where.get(prefix + "/client")(client)
    outer.include_router(inner)
    app.include_router(outer)
    return app


@pytest.mark.parametrize("prefix", ["/own", "/router"])
@pytest.mark.parametrize(("path", "admin"), [("/admin/x", True), ("/client", False), ("/nothing", False)])
def test_the_level_of_a_route(prefix: str, path: str, admin: bool) -> None:
    scope = {"type": "http", "method": "GET", "path": prefix + path, "headers": [], "root_path": ""}
    level = hooks.auth_level(STOCK_LEVEL, application(), scope)
    assert level == (auth.AuthLevel.ADMIN_OPTIONAL if admin else auth.AuthLevel.NORMAL)


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
def test_what_is_mounted_is_anybodys(path: str) -> None:
    """SGLang mounts /metrics, and a server of ours always has an admin key: scrapes go through here."""
    app = application()
    app.mount("/metrics", FastAPI())
    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "root_path": ""}
    assert hooks.auth_level(STOCK_LEVEL, app, scope) == auth.AuthLevel.NORMAL


def test_every_marked_route_of_sglangs_has_its_level() -> None:
    from sglang.srt.entrypoints.http_server import app

    from tests.fuzz.routes import all_routes

    for (method, path), admin in all_routes().items():
        filled = path.replace("{", "").replace("}", "").replace(":path", "")
        scope = {"type": "http", "method": method, "path": filled, "headers": [], "root_path": ""}
        level = hooks.auth_level(STOCK_LEVEL, app, scope)
        assert (level != auth.AuthLevel.NORMAL) == admin, (method, path)


def test_where_a_route_is_written_is_not_told() -> None:
    from fastapi.exceptions import RequestValidationError

    context: Any = {"file": "/srv/app.py", "line": 5, "function": "f", "path": "POST /f"}
    error = RequestValidationError([{"loc": ("body",), "msg": "m", "type": "t"}], endpoint_ctx=context)
    stock = RequestValidationError._format_endpoint_context
    assert "/srv/app.py" in getattr(stock, "__wrapped__", stock)(error)
    assert hooks.hide_source(getattr(stock, "__wrapped__", stock), error) == ""


def manager(backend: str = "lighttransfer") -> Any:
    """What of TokenizerManager says whose requests it takes."""
    args = SimpleNamespace(
        attention_backend=backend, prefill_attention_backend=None, decode_attention_backend=None
    )
    return SimpleNamespace(server_args=args)


def test_memory_is_not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """--enable-memory-saver is refused (test_refusals.py); a stock engine in this process may have it."""
    calls: list[Any] = []

    def release(manager: Any) -> None:
        hooks.refuse_memory_release(lambda *given: calls.append(given), manager, "body", None)

    with pytest.raises(HTTPException) as caught:
        release(manager())
    assert caught.value.status_code == 400 and "--enable-memory-saver" in caught.value.detail
    assert not calls
    stock = manager("fa3")
    release(stock)
    assert calls == [(stock, "body", None)]
    monkeypatch.setenv("LT_SGLANG_GUARD", "off")
    release(manager())
    assert len(calls) == 2


def test_experts_are_recorded_only_where_there_is_a_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = SimpleNamespace(expert_distribution_recorder_mode=None)
    monkeypatch.setattr("sglang.srt.runtime_context.get_exec", lambda: SimpleNamespace(moe=mode))
    with pytest.raises(HTTPException, match="no record of experts"):
        hooks.refuse_expert_recording(lambda manager: manager, manager())
    assert hooks.refuse_expert_recording(lambda manager: 5, manager("fa3")) == 5
    mode.expert_distribution_recorder_mode = "stat"
    assert hooks.refuse_expert_recording(lambda manager: 5, manager()) == 5
