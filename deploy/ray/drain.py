"""Let a node's engines finish before its pod ends: ``python -m deploy.ray.drain SECONDS``, its preStop hook.

An evicted pod gets SIGTERM, upon which Ray ends the node and its actors within seconds, streams or not. Here
Ray is told first that the node goes: Serve sends its replicas no new requests, starts others elsewhere if
there is room, and ends each replica once its requests are done. This returns when none of the node's engines
is left, or after SECONDS.

RAY_ADDRESS is the cluster's, as KubeRay sets it. DRAIN_NODE (id or address; default: this one's address) and
DRAIN_BELOW (a process; default 1, the container's first) are for nodes that share a machine.
"""

from __future__ import annotations

import os
import sys
import time

import psutil

ENGINE = "lt_sglang.cli.server"
POLL_SECONDS = 1.0
REASON = "the pod is ended"
ALIVE = 0  # GcsNodeInfo.GcsNodeState


def engines(below: int) -> list[psutil.Process]:
    """The engines that process ``below`` or its descendants have started."""
    found = []
    for process in psutil.Process(below).children(recursive=True):
        try:
            if ENGINE in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue  # it has ended
    return found


def announce(address: str, node: str, seconds: int) -> None:
    """Tell the cluster that ``node`` goes within ``seconds``; raises RuntimeError if it will not have it."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=address)
    known = {
        node_id.hex(): info.node_manager_address
        for node_id, info in client.get_all_node_info().items()
        if info.state == ALIVE
    }
    wanted = [node_id for node_id, host in known.items() if node in (node_id, host)]
    if len(wanted) != 1:
        raise RuntimeError(f"{address} knows {len(wanted)} nodes {node}")
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(wanted[0], reason, REASON, int((time.time() + seconds) * 1000))
    if not accepted:
        raise RuntimeError(f"{node} is not drained: {why}")


def main(argv: list[str]) -> int:
    """Announce, then wait; 1 if engines are left."""
    import ray

    seconds, below = int(argv[0]), int(os.environ.get("DRAIN_BELOW", "1"))
    node = os.environ.get("DRAIN_NODE") or ray.util.get_node_ip_address()
    announce(os.environ["RAY_ADDRESS"], node, seconds)
    deadline = time.monotonic() + seconds
    while engines(below):
        if time.monotonic() > deadline:
            return 1
        time.sleep(POLL_SECONDS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
