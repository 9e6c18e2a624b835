"""Refuses requests before the server is ready, but for its own warm-up.

SGLang opens its port, sends itself a prompt, and kills itself if that is not answered with 200. A client's
prompt in front of it, a full queue, or an abort of all requests would end the start. So until SGLang says it
is up, everything but questions about its state is answered with 503 here, before it reaches a handler. The
warm-up gets past under a path of its own, which nobody else knows.

Source: sglang/srt/entrypoints/http_server.py (_execute_server_warmup).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

RETRY_SECONDS = 5
MESSAGE = "The server is starting; it takes requests once GET /ready answers 200."
# Beginnings of paths that only say how the server is.
QUESTIONS = (
    "/health",
    "/ready",
    "/ping",
    "/metrics",
    "/model_info",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/v1/models",
    "/v1/loads",
    "/get_load",
)
# What the warm-up asks for. None needs an admin key, which a path of its own would get around.
WARM_UP_PATHS = ("/model_info", "/generate", "/encode", "/v1/chat/completions", "/v1/systemone")
# An operator who lets the server wait for its weights sends them before it is ready.
WEIGHTS = "weights"


class ReadyGate:
    """ASGI middleware.

    Args:
        app: what it stands in front of.
        starting: whether the server is not ready yet.
        waits_for_weights: whether it is started without weights, which are sent to it.
        token: the warm-up's paths begin with it.
    """

    def __init__(
        self, app: Any, starting: Callable[[], bool], waits_for_weights: Callable[[], bool], token: str
    ) -> None:
        self.app = app
        self.starting = starting
        self.waits_for_weights = waits_for_weights
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 503."""
        if scope["type"] not in ("http", "websocket") or not self.starting():
            await self.app(scope, receive, send)
            return
        root = str(scope.get("root_path", ""))
        path = str(scope["path"]).removeprefix(root)
        own = path.removeprefix(f"/{self.token}")
        if own != path and own in WARM_UP_PATHS:
            scope = {**scope, "path": root + own, "raw_path": (root + own).encode()}
        elif not self._asks_only(scope, path):
            await _refuse(scope, send)
            return
        await self.app(scope, receive, send)

    def _asks_only(self, scope: Scope, path: str) -> bool:
        if scope["type"] != "http":
            return False
        if WEIGHTS in path and self.waits_for_weights():
            return True
        method = scope["method"]
        return method == "OPTIONS" or (method in ("GET", "HEAD") and path.startswith(QUESTIONS))


class PastTheGate:
    """SGLang's ServerArgs for its warm-up: the same, but for the address the warm-up goes to."""

    def __init__(self, server_args: Any, token: str) -> None:
        self._server_args = server_args
        self._token = token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server_args, name)

    def url(self, port: int | None = None) -> str:
        """Where the server listens, for the warm-up."""
        return f"{self._server_args.url(port)}/{self._token}"


def guard(app: Any, tokenizer_manager: Any, warm_up: Callable[[Any], bool] | None) -> Callable[[Any], bool]:
    """Put a gate in front of SGLang's FastAPI ``app``, and return a warm-up that gets past it.

    tokenizer_manager: knows whether the server is up. warm_up: SGLang's if None.
    """
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.tokenizer_manager import ServerStatus
    from sglang.srt.runtime_context import get_model

    run = warm_up or http_server._execute_server_warmup
    token = f"lt-warm-up-{secrets.token_hex(16)}"
    app.add_middleware(
        ReadyGate,
        starting=lambda: tokenizer_manager.server_status == ServerStatus.Starting,
        waits_for_weights=lambda: bool(get_model().checkpoint_engine_wait_weights_before_ready),
        token=token,
    )
    return lambda server_args: run(PastTheGate(server_args, token))


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1013, "reason": MESSAGE})
        return
    error = {"message": MESSAGE, "type": "ServiceUnavailable", "code": 503}
    headers = [(b"content-type", b"application/json"), (b"retry-after", str(RETRY_SECONDS).encode())]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
