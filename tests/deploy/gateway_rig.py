"""SGLang's gateway as the chart starts it, beside stand-ins for engines and for the API server."""

from __future__ import annotations

import json
import queue
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests

from lt_sglang.launch.processes import free_port, kill_tree, spawn

from ..http_server import serving
from .chart import one, template

ROOT = Path(__file__).resolve().parents[2]
CLIENT, OPERATOR = "client-key", "operator-key"
BESIDE = True  # the chart's second container runs too
LABELS = {
    "app.kubernetes.io/name": "lt-sglang",
    "app.kubernetes.io/instance": "lt-sglang",
    "app.kubernetes.io/component": "engine",
    "lt-sglang/serves": "http",
}


class Cluster:
    """An API server that knows pods: listed, and told of by watches.

    Attributes:
        url: its address. port: of every engine; pods differ by their address in 127.0.0.0/8.
        silent: watches tell nothing any more, though they stay open.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.silent = False
        self.url = ""
        self._pods: dict[str, dict[str, Any]] = {}
        self._watches: list[queue.Queue[bytes]] = []

    def add(self, name: str, address: str, **labels: str) -> None:
        """A pod that is ready; further labels go over those of the release's engines."""
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "lt-sglang", "uid": name, "resourceVersion": "10"},
            "spec": {"containers": [{"name": "engine"}]},
            "status": {
                "phase": "Running",
                "podIP": address,
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }
        pod["metadata"]["labels"] = {**LABELS, **labels}
        self._pods[name] = pod
        self._tell("ADDED", pod)

    def delete(self, name: str) -> None:
        """As `kubectl delete --force` does it: the pod is gone, without a time in which it ends."""
        self._tell("DELETED", self._pods.pop(name))

    def _tell(self, kind: str, pod: dict[str, Any]) -> None:
        line = json.dumps({"type": kind, "object": pod}).encode() + b"\n"
        for watch in [] if self.silent else self._watches:
            watch.put(line)

    def kubeconfig(self, folder: Path) -> Path:
        """A file by which a client finds this server."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "lt-sglang"}}],
        }
        file = folder / "kubeconfig"
        file.write_text(json.dumps(config), encoding="utf-8")
        return file

    @contextmanager
    def running(self) -> Iterator[Cluster]:
        """Answer, for as long as the block runs."""
        cluster = self

        class Api(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                if "watch=true" in self.path:
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    watch: queue.Queue[bytes] = queue.Queue()
                    cluster._watches.append(watch)
                    while True:
                        line = watch.get()
                        self.wfile.write(b"%x\r\n" % len(line) + line + b"\r\n")
                listed = {
                    "kind": "PodList",
                    "apiVersion": "v1",
                    "metadata": {"resourceVersion": "10"},
                    "items": [pod for pod in cluster._pods.values() if cluster._selected(pod, self.path)],
                }
                body = json.dumps(listed).encode()
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        with serving(Api) as self.url:
            yield self

    @staticmethod
    def _selected(pod: dict[str, Any], path: str) -> bool:
        query = parse_qs(urlsplit(path).query).get("labelSelector", [""])[0]
        wanted = dict(pair.split("=") for pair in query.split(",") if pair)
        return wanted.items() <= pod["metadata"]["labels"].items()


def engine_handler(model: str = "m") -> type[BaseHTTPRequestHandler]:
    """Answers what a gateway asks an engine of ``model``; its class counts completions in ``served``."""

    class Engine(BaseHTTPRequestHandler):
        served = 0
        protocol_version = "HTTP/1.1"

        def _send(self, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._send({"model_path": model, "served_model_name": model, "tp_size": 1, "dp_size": 1})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            type(self).served += 1
            self._send({"text": model, "meta_info": {"finish_reason": {"type": "stop"}}})

        def log_message(self, *_: Any) -> None: ...

    return Engine


@contextmanager
def engines(count: int) -> Iterator[dict[str, Any]]:
    """By address, the handler's class; two at least, as the gateway's default policy wants of named ones."""
    with ExitStack() as stack:
        handlers = [engine_handler() for _ in range(count)]
        yield {stack.enter_context(serving(handler)): handler for handler in handlers}


@contextmanager
def gateway(
    path: Path, folder: Path, workers: Sequence[str], *sets: str, cluster: Cluster | None = None
) -> Iterator[str]:
    """The chart's gateway, run here; its address.

    Args:
        path: PYTHONPATH of SGLang's gateway.
        folder: for its log and as its temporary folder.
        workers: addresses of its engines, which it waits for.
        sets: of the chart.
        cluster: finds them there, by the chart's own arguments, and runs the chart's second container too.
    """
    pod = one(template(*sets), "Deployment", "lt-sglang-gateway")["spec"]["template"]["spec"]
    spec, compares = pod["containers"]
    port = free_port()
    here = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--prometheus-host": "127.0.0.1",
        "--prometheus-port": str(free_port()),
        "--service-discovery-port": str(cluster.port if cluster else 0),
    }
    keys = {"LT_API_KEY": CLIENT, "LT_ADMIN_KEY": OPERATOR}
    wanted = {item["name"] for item in spec.get("env", [])}
    env = {name: value for name, value in keys.items() if name in wanted}
    if cluster is not None:
        env |= {"KUBECONFIG": str(cluster.kubeconfig(folder))}
    args, skipping = [], False
    for arg in spec["args"]:
        flag = arg.partition("=")[0]
        # Engines are named here; in a cluster they are found by their labels.
        skipping = flag == "--selector" or (skipping and not arg.startswith("--"))
        if cluster is None and (skipping or flag.startswith("--service-discovery")):
            continue
        args.append(f"{flag}={here[flag]}" if flag in here else arg.replace("$(LT_API_KEY)", CLIENT))
    command = [*spec["command"], *args, *([] if cluster else ["--worker-urls", *workers])]
    env |= {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "TMPDIR": str(folder)}
    process = spawn(command, {"PYTHONPATH": str(path), **env}, folder / "log")
    processes = [process]
    url = f"http://127.0.0.1:{port}"
    if cluster is not None and BESIDE:
        said = {item["name"]: item["value"] for item in compares["env"] if "value" in item}
        replaced = {"GATEWAY": url, "ENGINE_PORT": str(cluster.port), "API_SERVER": cluster.url}
        assert {"GATEWAY", "ENGINE_PORT", "SELECTOR", "NAMESPACE"} <= said.keys()
        beside = {**env, **said, **replaced, "PERIOD_SECONDS": "2"}
        script = ROOT / "deploy" / "gateway" / Path(compares["command"][1]).name
        processes.append(spawn([sys.executable, str(script)], beside, folder / "workers.log"))
    try:
        deadline = time.monotonic() + 120
        while not ready(url, len(workers)):
            running = process.poll() is None and time.monotonic() < deadline
            assert running, (folder / "log").read_text(errors="replace")[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        for started in processes:
            kill_tree(started)


def ready(url: str, workers: int) -> bool:
    """Whether the gateway has so many engines that are well."""
    try:
        found = requests.get(f"{url}/readiness", timeout=2)
        return found.status_code == 200 and found.json().get("healthy_workers", workers) >= workers
    except requests.RequestException:
        return False
