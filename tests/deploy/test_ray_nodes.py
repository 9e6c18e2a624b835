"""One engine over two Ray nodes: a tensor-parallel group by SGLang's own --nnodes in the placement group."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import pytest
import requests

from lt_sglang.launch.processes import free_port
from tests.engine.environment import server_environment
from tests.engine.models import ensure_model

from .test_ray import FLAGS, GREEDY, START_SECONDS, wait_until

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Two Ray nodes on this machine, with room for one rank each."""
    from ray import serve
    from ray.cluster_utils import Cluster

    from deploy.ray.app import build

    before = dict(os.environ)
    os.environ.update(server_environment(tp=2))
    port, memory = free_port(), 100 * 2**20
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": memory})
    try:
        cluster.add_node(num_cpus=2, object_store_memory=memory)
        ray.init(address=cluster.address)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        model = str(ensure_model("llama"))
        settings = {"model": model, "gpu": False, "tp": 2, "nodes": 2, "cpus": 1, "args": list(FLAGS)}
        serve.run(build({**settings, "start_seconds": START_SECONDS, "drain_seconds": 60}), name="lt")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def ranks() -> dict[str, psutil.Process]:
    """The server process of each node, by --node-rank."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "lt_sglang.cli.server" in command:
            found.update({arg: process for arg in command if arg.startswith("--node-rank=")})
    return found


def generate(url: str) -> requests.Response:
    body = {"input_ids": list(range(5, 305)), "sampling_params": {**GREEDY, "max_new_tokens": 16}}
    return requests.post(f"{url}/generate", json=body, timeout=300)


def test_two_nodes_serve_and_come_back_together(url: str) -> None:
    answer = generate(url)
    assert answer.status_code == 200
    expected = answer.json()["output_ids"]
    first = ranks()
    assert set(first) == {"--node-rank=0", "--node-rank=1"}
    first["--node-rank=1"].kill()

    def both_new() -> bool:
        now = ranks()
        return len(now) == 2 and all(now[rank].pid != first[rank].pid for rank in now)

    wait_until(both_new, START_SECONDS)
    wait_until(lambda: generate(url).status_code == 200, START_SECONDS)
    assert generate(url).json()["output_ids"] == expected
