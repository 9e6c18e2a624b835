"""The deployment that clients reach: finds an engine for a request, and another one if that fails in time."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError, RayTaskError, TaskUnschedulableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from deploy.ray.child import EngineGone
from deploy.ray.engine import HOP_HEADERS

logger = logging.getLogger("ray.serve")

RETRY_SECONDS = 15.0
PAUSES = (0.1, 0.25, 0.5, 1.0, 2.0)
RETRY_AFTER = {"Retry-After": "5"}
BUSY = (BackPressureError, DeploymentUnavailableError)
LOST = (EngineGone, RayActorError, TaskUnschedulableError)


class Front:
    """Passes requests to engines. One that fails before its first byte goes to another engine."""

    def __init__(self, engines: DeploymentHandle) -> None:
        self._engines = engines.options(method_name="pass_on", stream=True)

    async def __call__(self, request: Request) -> Response:
        """Answer with what the engine says, byte by byte; 503 if no engine takes the request."""
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = {name: value for name, value in request.headers.items() if name not in HOP_HEADERS}
        body = await request.body()
        deadline = time.monotonic() + RETRY_SECONDS
        for attempt in itertools.count():
            pieces = self._engines.remote(request.method, path, headers, body).__aiter__()
            try:
                status, answered = await pieces.__anext__()
            except BUSY:
                break
            except LOST + (RayTaskError,) as error:
                if not is_lost(error):
                    raise
                logger.warning("attempt %d: %s", attempt + 1, str(error).splitlines()[-1])
                if time.monotonic() > deadline:
                    break
                # Serve needs a moment to see that a replica is gone.
                await asyncio.sleep(PAUSES[min(attempt, len(PAUSES) - 1)])
                continue
            return StreamingResponse(rest(pieces), status_code=status, headers=answered)
        refusal = {"message": "no engine takes requests now", "type": "service_unavailable", "code": 503}
        return JSONResponse({"error": refusal}, status_code=503, headers=RETRY_AFTER)


async def rest(pieces: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """The body; an engine lost in the middle of it ends the connection, as the engine itself would."""
    async for piece in pieces:
        yield piece


def is_lost(error: BaseException) -> bool:
    """Whether another engine can take the request: its own answer, however bad, is not repeated."""
    return isinstance(error, LOST) or isinstance(getattr(error, "cause", None), LOST)
