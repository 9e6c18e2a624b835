"""SGLang's routes, from the decorators of the installed version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Route = tuple[str, str]


def all_routes() -> dict[Route, bool]:
    """(method, path) of every HTTP route, and whether it is an admin's."""
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import AuthLevel

    found: dict[Route, bool] = {}
    for route in _flat(app.routes):
        level = getattr(route.endpoint, "_auth_level", AuthLevel.NORMAL)
        for method in getattr(route, "methods", None) or ():
            found.setdefault((method, route.path), level != AuthLevel.NORMAL)
    return found


def _flat(routes: Any) -> Iterator[Any]:
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is not None:
            yield from _flat(router.routes)
        elif hasattr(route, "endpoint"):
            yield route


def admin_routes() -> list[Route]:
    """Those that need the admin key."""
    return sorted(route for route, admin in all_routes().items() if admin)


def client_routes() -> list[Route]:
    """Those a client may call."""
    return sorted(route for route, admin in all_routes().items() if not admin)
