"""Ray for real, nodes apart: scaling by load, and a node whose pod is evicted while it streams."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from lt_sglang.launch.processes import free_port
from tests.engine.environment import server_environment
from tests.engine.models import ensure_model

from .chart import one
from .test_ray import FLAGS, START_SECONDS, Client, Outcome, engine_processes, prompts, urls, wait_until
from .test_ray_config import MANIFESTS

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ENGINE_CPUS = 4  # more than the head has, so that each engine has a node of its own
STORE = 100 * 2**20
(WORKERS,) = one(MANIFESTS["cluster"], "RayCluster")["spec"]["workerGroupSpecs"]
HOOK = WORKERS["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
DRAIN_SECONDS = int(HOOK[-1])  # what is documented
# A stream of more than a minute on any machine: SGLang sleeps before each step.
TOKENS, STEP_SECONDS, MINUTE = 1500, 0.05, 60
OPERATOR = "operator-key"


class Nodes:
    """A head without room for engines, and nodes with room for one each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 3, "object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers: list[Any] = []

    def add(self) -> None:
        """One more node."""
        self.workers.append(self.cluster.add_node(num_cpus=ENGINE_CPUS, object_store_memory=STORE))

    def raylet(self, worker: Any) -> psutil.Process:
        """The process that a pod's SIGTERM reaches, and whose descendants the node's actors are."""
        return psutil.Process(worker.all_processes["raylet"][0].process.pid)

    def engines(self, worker: Any) -> list[psutil.Process]:
        """The engines of a node."""
        below = self.raylet(worker).children(recursive=True)
        return [process for process in engine_processes() if process in below]

    def deadlines(self) -> dict[str, float]:
        """When each node that is announced to go goes, by Ray's own record, in seconds since the epoch."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        draining = GcsClient(address=self.cluster.address).get_draining_nodes()
        return {node.hex() if isinstance(node, bytes) else node: ms / 1000 for node, ms in draining.items()}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    before = dict(os.environ)
    os.environ.update(server_environment())
    # A machine that runs other tests too is slow.
    os.environ |= {f"RAY_SERVE_PROXY_{what}_CHECK_TIMEOUT_S": "120" for what in ("READY", "HEALTH")}
    os.environ["LT_SGLANG_ADMIN_API_KEY"] = OPERATOR
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = Nodes()
    try:
        found.add()
        yield found
    finally:
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        found.cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def client(nodes: Nodes) -> Client:
    from ray import serve

    from deploy.ray.app import build

    ray.init(address=nodes.cluster.address)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = {
        "model": str(ensure_model("llama")),
        "gpu": False,
        "cpus": ENGINE_CPUS,
        "args": list(FLAGS),
        "replicas": [1, 2],
        "requests_per_replica": 2,
        "upscale_seconds": 2,
        "downscale_seconds": 10,
        "start_seconds": START_SECONDS,
        "drain_seconds": DRAIN_SECONDS,
    }
    serve.run(build(settings), name="lt")
    return Client(f"http://127.0.0.1:{port}")


def long_stream(client: Client, seed: int, seen: threading.Event) -> Outcome:
    """One that takes more than a minute; ``seen``: its first token is here."""
    for url in urls():
        key = {"Authorization": f"Bearer {OPERATOR}"}
        slow = {"forward_sleep_time": STEP_SECONDS}
        requests.post(f"{url}/slow_down", json=slow, headers=key, timeout=60).raise_for_status()
    return client.stream(prompts(1, seed)[0], TOKENS, seen)


def test_load_scales_from_one_engine_to_two_and_back(nodes: Nodes, client: Client) -> None:
    """Requests in progress decide: more than two for each engine start another; its absence ends one."""
    assert len(engine_processes()) == 1
    nodes.add()
    ended = threading.Event()

    def load(seed: int) -> int:
        served = 0
        while not ended.is_set():
            served += client.stream(prompts(1, seed)[0], 400).finished
        return served

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(load, seed) for seed in range(6)]
        try:
            wait_until(lambda: all(nodes.engines(worker) for worker in nodes.workers), START_SECONDS)
        finally:
            ended.set()
        assert all(future.result() > 0 for future in running), "nobody was turned away"
    wait_until(lambda: len(engine_processes()) == 1, 180)
    assert client.whole([5, 6, 7]).status_code == 200


def test_an_evicted_node_ends_its_streams_first(nodes: Nodes, client: Client) -> None:
    """The preStop hook of k8s/ray, then SIGTERM, as the kubelet does it: the stream ends whole.

    Another node has room, so Serve starts the engine's successor there.
    """
    wait_until(lambda: client.whole([5, 6, 7]).status_code == 200, START_SECONDS)
    (worker,) = [worker for worker in nodes.workers if nodes.engines(worker)]
    (engine,) = nodes.engines(worker)
    seen = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(long_stream, client, 7, seen)
        assert seen.wait(60)
        begun, announced = time.monotonic(), time.time()
        hook = subprocess.Popen(
            [sys.executable, *HOOK[1:]],
            cwd=ROOT,
            env={
                **os.environ,
                "RAY_ADDRESS": nodes.cluster.address,
                "DRAIN_NODE": worker.node_id,
                "DRAIN_BELOW": str(nodes.raylet(worker).pid),
            },
        )
        wait_until(lambda: worker.node_id in nodes.deadlines(), 60)
        given = nodes.deadlines()[worker.node_id] - announced
        outcome = stream.result()
        streamed = time.monotonic() - begun
        assert hook.wait(180) == 0, "no engine was left"
    assert DRAIN_SECONDS <= given < DRAIN_SECONDS + 60, "Ray's deadline, from when the hook has started"
    assert outcome.finished and len(outcome.tokens) == TOKENS, outcome.error
    assert not engine.is_running()
    assert streamed > MINUTE, "Ray itself ends a node's actors sooner than that"
    print(f"Ray gave {given:.0f} s; the stream went on for {streamed:.0f} s and ended whole")
    nodes.raylet(worker).terminate()
    wait_until(lambda: client.whole([5, 6, 7]).status_code == 200, START_SECONDS)
    assert not nodes.engines(worker)


def test_without_the_hook_a_stream_is_cut(nodes: Nodes, client: Client) -> None:
    """What the hook is for: upon SIGTERM alone Ray ends a node's actors long before the documented drain."""
    (worker,) = [worker for worker in nodes.workers[1:] + nodes.workers[:1] if _serves(nodes, worker)]
    seen = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(long_stream, client, 8, seen)
        assert seen.wait(60)
        begun = time.monotonic()
        nodes.raylet(worker).terminate()
        outcome = stream.result()
        cut = time.monotonic() - begun
    assert outcome.started and not outcome.finished and cut < MINUTE, (cut, len(outcome.tokens))
    print(f"Ray cut the stream {cut:.0f} s after SIGTERM")


def _serves(nodes: Nodes, worker: Any) -> bool:
    try:
        return bool(nodes.engines(worker))
    except psutil.NoSuchProcess:
        return False
