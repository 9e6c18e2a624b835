"""Shared servers, and the order of tests that lets each start once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import in_several_processes

from .host import Host
from .server import Server
from .specs import SERVERS

HOST = pytest.StashKey[Host]()
ORDER = {name: position for position, name in enumerate(SERVERS)}


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers used here."""
    config.addinivalue_line("markers", "engine: starts real SGLang servers on a CPU")
    config.addinivalue_line("markers", "served_by(name): the shared server a test runs against")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests of this folder by the server they use; tests without one come first."""
    if in_several_processes(config):
        return  # sorted by tests/conftest.py
    mine = [index for index, item in enumerate(items) if item.get_closest_marker("engine")]
    ordered = sorted((items[index] for index in mine), key=_position)
    for index, item in zip(mine, ordered, strict=True):
        items[index] = item


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End a server that the next test does not use: other tests take its memory."""
    host = item.config.stash.get(HOST, None)
    if host is not None and (nextitem is None or _served_by(nextitem) is None):
        host.stop()


def _position(item: pytest.Item) -> int:
    name = _served_by(item)
    return -1 if name is None else ORDER[name]


def _served_by(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("served_by")
    return None if marker is None else str(marker.args[0])


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The one place servers come from."""
    plan = dict.fromkeys(filter(None, map(_served_by, request.session.items)))
    # Where several processes share the tests, each has a server, and no core is left to start another.
    ahead = [] if in_several_processes(request.config) else list(plan)
    host = Host(tmp_path_factory.mktemp("servers"), ahead)
    request.config.stash[HOST] = host
    yield host
    host.stop()


@pytest.fixture
def server(request: pytest.FixtureRequest, host: Host) -> Server:
    """The server named by the test's ``served_by`` marker."""
    marker = request.node.get_closest_marker("served_by")
    assert marker is not None, "mark the test with served_by(name)"
    return host.get(marker.args[0])
