"""The pinned gateway in a cluster whose pods vanish: by itself, and with the chart's second container."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from ..http_server import serving
from . import gateway_rig
from .gateway_rig import Cluster, engine_handler, gateway

pytestmark = pytest.mark.slow

OURS = ("127.0.0.2", "127.0.0.3")
LATE = "127.0.0.4"
SETS = ("adminKeySecret.name=operators",)
MINUTE = 60.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster().running() as running:
        yield running


def known(url: str, folder: Path) -> set[str]:
    """The hosts that the gateway sends requests to; its key is where its second container finds it."""
    headers = {"Authorization": f"Bearer {(folder / 'admin-key').read_text()}"}
    workers = requests.get(f"{url}/workers", headers=headers, timeout=10).json()["workers"]
    return {worker["url"].removeprefix("http://").partition(":")[0] for worker in workers}


def answers(url: str, count: int = 12) -> set[str]:
    """Which models answer."""
    body = {"text": "which model is this?"}
    return {requests.post(f"{url}/generate", json=body, timeout=30).json()["text"] for _ in range(count)}


def within(seconds: float, what: Callable[[], bool]) -> float:
    """How long it took; fails after ``seconds``."""
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < seconds
        time.sleep(0.5)
    return time.monotonic() - begun


def test_a_deleted_pod_is_gone_within_a_minute(cluster: Cluster, gateway_path: Path, tmp_path: Path) -> None:
    """Its address goes to another release's engine at once, whose model must not answer."""
    with ExitStack() as stack:
        for number, address in enumerate(OURS):
            stack.enter_context(serving(engine_handler("ours"), address, cluster.port))
            cluster.add(f"engine-{number}", address)
        urls = [f"http://{address}:{cluster.port}" for address in OURS]
        url = stack.enter_context(gateway(gateway_path, tmp_path, urls, *SETS, cluster=cluster))
        assert known(url, tmp_path) == set(OURS) and answers(url) == {"ours"}
        assert (tmp_path / "round").exists(), "what the container's probes look at"
        cluster.delete("engine-1")
        other = {"app.kubernetes.io/instance": "other"}
        cluster.add("other-engine-0", OURS[1], **other)
        within(MINUTE, lambda: known(url, tmp_path) == {OURS[0]})
        # It comes back as it does after an eviction: the same name and address.
        cluster.delete("other-engine-0")
        cluster.add("engine-1", OURS[1])
        within(MINUTE, lambda: known(url, tmp_path) == set(OURS))
    assert "taken out" in (tmp_path / "workers.log").read_text(encoding="utf-8")


def test_a_silent_watch_hides_no_pod(cluster: Cluster, gateway_path: Path, tmp_path: Path) -> None:
    """The connection stays open and says nothing, as behind a load balancer that has forgotten it."""
    with ExitStack() as stack:
        stack.enter_context(serving(engine_handler("ours"), OURS[0], cluster.port))
        stack.enter_context(serving(engine_handler("ours"), LATE, cluster.port))
        cluster.add("engine-0", OURS[0])
        url = stack.enter_context(
            gateway(gateway_path, tmp_path, [f"http://{OURS[0]}:{cluster.port}"], cluster=cluster)
        )
        cluster.silent = True
        cluster.add("engine-1", LATE)
        within(MINUTE, lambda: known(url, tmp_path) == {OURS[0], LATE})
        cluster.delete("engine-0")
        within(MINUTE, lambda: known(url, tmp_path) == {LATE})
        assert answers(url) == {"ours"}


def test_the_gateway_alone_keeps_a_deleted_pod(
    cluster: Cluster, gateway_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that the container is for: if this fails, the pinned gateway has mended it and it can go."""
    monkeypatch.setattr(gateway_rig, "BESIDE", False)
    with ExitStack() as stack:
        for number, address in enumerate(OURS):
            stack.enter_context(serving(engine_handler(f"model-{number}"), address, cluster.port))
            cluster.add(f"engine-{number}", address)
        urls = [f"http://{address}:{cluster.port}" for address in OURS]
        url = stack.enter_context(gateway(gateway_path, tmp_path, urls, *SETS, cluster=cluster))
        cluster.delete("engine-1")
        time.sleep(10)
        assert known(url, tmp_path) == set(OURS) and "model-1" in answers(url)
