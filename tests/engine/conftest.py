"""Shared servers, and the order of tests that lets each start once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .host import Host
from .server import Server
from .specs import SERVERS

ORDER = {name: position for position, name in enumerate(SERVERS)}


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers used here."""
    config.addinivalue_line("markers", "engine: starts real SGLang servers on a CPU")
    config.addinivalue_line("markers", "served_by(name): the shared server a test runs against")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests of this folder by the server they use; tests without one come first."""
    mine = [index for index, item in enumerate(items) if item.get_closest_marker("engine")]
    ordered = sorted((items[index] for index in mine), key=_position)
    for index, item in zip(mine, ordered, strict=True):
        items[index] = item


def _position(item: pytest.Item) -> int:
    marker = item.get_closest_marker("served_by")
    return ORDER[marker.args[0]] if marker else -1


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The one place servers come from."""
    markers = (item.get_closest_marker("served_by") for item in request.session.items)
    plan = dict.fromkeys(marker.args[0] for marker in markers if marker)
    host = Host(tmp_path_factory.mktemp("servers"), list(plan))
    yield host
    host.stop()


@pytest.fixture
def server(request: pytest.FixtureRequest, host: Host) -> Server:
    """The server named by the test's ``served_by`` marker."""
    marker = request.node.get_closest_marker("served_by")
    assert marker is not None, "mark the test with served_by(name)"
    return host.get(marker.args[0])
