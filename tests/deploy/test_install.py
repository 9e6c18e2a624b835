"""Helm's own install, upgrade and uninstall, against an API server that keeps what it is given."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from ..http_server import serving
from .chart import CHART, MONITORING

# API groups and the plurals of their kinds.
KINDS = {
    "v1": {"Secret", "ConfigMap", "Service", "ServiceAccount", "PersistentVolumeClaim", "Pod"},
    "apps/v1": {"Deployment"},
    "batch/v1": {"Job"},
    "policy/v1": {"PodDisruptionBudget"},
    "rbac.authorization.k8s.io/v1": {"Role", "RoleBinding"},
    "networking.k8s.io/v1": {"NetworkPolicy"},
    "monitoring.coreos.com/v1": {"PodMonitor", "PrometheusRule"},
    "gateway.networking.k8s.io/v1": {"HTTPRoute"},
}
PROTOBUF = b"k8s\0"
BASE = "model.name=me/model,modelCache.download=false"
OTHER = (
    *("gateway.enabled=false", "lightTransfer.mode=dynamic", "engine.replicas=2"),
    *("modelCache.keep=false", "compileCache.size=20Gi"),
)


def plural(kind: str) -> str:
    return re.sub("y$", "ie", kind.lower()) + "s"


def discovery() -> dict[str, Any]:
    """What an API server says of itself."""
    answers: dict[str, Any] = {
        "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
    }
    groups = []
    for version, kinds in KINDS.items():
        resources = [
            {
                "name": plural(kind),
                "singularName": kind.lower(),
                "namespaced": True,
                "kind": kind,
                "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
            }
            for kind in sorted(kinds)
        ]
        path = f"/api/{version}" if version == "v1" else f"/apis/{version}"
        answers[path] = {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        if version != "v1":
            name, _, number = version.partition("/")
            one = {"groupVersion": version, "version": number}
            groups.append({"name": name, "versions": [one], "preferredVersion": one})
    answers["/apis"] = {"kind": "APIGroupList", "groups": groups}
    return answers


class Store:
    """Objects by path; a name at the end, or a folder of one kind."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.deleted: list[str] = []

    def names(self) -> set[str]:
        """kind/name of what is there, Helm's own records aside."""
        found = [item for item in self.objects.values() if item.get("type") != "helm.sh/release.v1"]
        return {f"{item['kind']}/{item['metadata']['name']}" for item in found}

    def select(self, folder: str, selector: str) -> list[dict[str, Any]]:
        """What is in a folder and has the labels."""
        wanted = dict(pair.split("=") for pair in re.split(r",(?![^(]*\))", selector) if "=" in pair)
        inside = [item for path, item in self.objects.items() if path.rpartition("/")[0] == folder]
        return [item for item in inside if wanted.items() <= item["metadata"].get("labels", {}).items()]

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its address."""
        store, known = self, discovery()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _say(self, code: int, answer: Any) -> None:
                body = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _body(self) -> Any:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return secret(body) if body.startswith(PROTOBUF) else yaml.safe_load(body)

            def _missing(self) -> None:
                self._say(404, {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404})

            def _keep(self, path: str, item: dict[str, Any], code: int = 200) -> None:
                item["metadata"] |= {"uid": path, "resourceVersion": "1"}
                store.objects[path] = item
                self._say(code, item)

            def do_GET(self) -> None:
                path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
                kinds = {plural(kind) for group in KINDS.values() for kind in group}
                if path in known:
                    self._say(200, known[path])
                elif path in store.objects:
                    self._say(200, store.objects[path])
                elif path.rpartition("/")[2] in kinds:
                    items = store.select(path, query.get("labelSelector", [""])[0])
                    kind = "SecretList" if path.endswith("/secrets") else "List"
                    self._say(200, {"kind": kind, "apiVersion": "v1", "metadata": {}, "items": items})
                else:
                    self._missing()

            def do_POST(self) -> None:
                item = self._body()
                self._keep(f"{urlsplit(self.path).path}/{item['metadata']['name']}", item, 201)

            def do_PUT(self) -> None:
                self._keep(urlsplit(self.path).path, self._body())

            def do_PATCH(self) -> None:
                path, change = urlsplit(self.path).path, self._body()
                applied = "apply-patch" in self.headers["Content-Type"]
                self._keep(path, change if applied else merged(store.objects[path], change))

            def do_DELETE(self) -> None:
                path = urlsplit(self.path).path
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if store.objects.pop(path, None) is None:
                    return self._missing()
                store.deleted.append(path)
                self._say(200, {"kind": "Status", "status": "Success"})

            def log_message(self, *_: Any) -> None: ...

        with serving(Handler) as url:
            yield url


def fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a protobuf message, which are all that is read here."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        tag = number()
        size = number()
        if tag & 7 == 2:
            yield tag >> 3, data[at : at + size]
            at += size


def secret(body: bytes) -> dict[str, Any]:
    """Helm's record of a release: the one object that it sends as protobuf."""

    def entry(data: bytes) -> tuple[str, bytes]:
        pair = dict(fields(data))
        return pair[1].decode(), pair.get(2, b"")

    (content,) = (part for field, part in fields(body[len(PROTOBUF) :]) if field == 2)
    parts = list(fields(content))
    meta = list(fields(next(part for field, part in parts if field == 1)))
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": dict(meta)[1].decode(),
            "labels": {k: v.decode() for k, v in (entry(part) for field, part in meta if field == 11)},
        },
        "data": {
            k: base64.b64encode(v).decode() for k, v in (entry(part) for field, part in parts if field == 2)
        },
        "type": dict(parts)[3].decode(),
    }


def merged(old: Any, change: Any) -> Any:
    """A JSON merge patch."""
    if not isinstance(old, dict) or not isinstance(change, dict):
        return change
    result = dict(old)
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def helm(program: Path, url: str, *words: str) -> str:
    command = [str(program), *words, "--namespace", "llm", "--kube-apiserver", url]
    if words[0] != "uninstall":
        command.append("--disable-openapi-validation")  # test_manifests.py validates
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_what_is_installed_is_upgraded_and_uninstalled_whole(helm4: Path) -> None:
    """Nothing is left over but the models' claim, and not that either where the values give it up."""
    store = Store()
    with store.running() as url:
        for chart, name, given in ((CHART, "chat", BASE), (CHART, "code", BASE), (MONITORING, "alerts", "")):
            helm(helm4, url, "install", name, str(chart), *(["--set", given] if given else []))
        both = store.names()
        assert {"Deployment/chat-engine", "Deployment/code-gateway", "PrometheusRule/alerts"} <= both
        helm(helm4, url, "upgrade", "chat", str(CHART), "--set", ",".join((BASE, *OTHER)))
        gone = both - store.names()
        assert "Deployment/chat-gateway" in gone and not [name for name in gone if "/code" in name]
        assert "PersistentVolumeClaim/chat-kernels" in store.names()
        helm(helm4, url, "uninstall", "chat")
        assert not [name for name in store.names() if "/chat" in name]
        helm(helm4, url, "uninstall", "code")
        helm(helm4, url, "uninstall", "alerts")
    assert store.names() == {"PersistentVolumeClaim/code-models"}, "kept, as its values say"


def fixed(item: dict[str, Any]) -> Any:
    """What of an object Kubernetes lets nobody change."""
    spec = item.get("spec", {})
    if item["kind"] == "Deployment":
        return spec["selector"]
    if item["kind"] == "LeaderWorkerSet":
        return spec["leaderWorkerTemplate"]["size"]
    if item["kind"] == "PersistentVolumeClaim":
        return {key: value for key, value in spec.items() if key != "resources"}
    return item.get("roleRef")


def test_an_upgrade_from_010_changes_nothing_that_is_fixed() -> None:
    """installed-0.1.0.json: of each object of 0.1.0's manifests, what cannot change."""
    from .chart import VALUES, template

    before = json.loads(Path(__file__).with_name("installed-0.1.0.json").read_text(encoding="utf-8"))
    assert before.keys() == VALUES.keys()
    for name, known in before.items():
        after = {f"{item['kind']}/{item['metadata']['name']}": fixed(item) for item in template(values=name)}
        same = {key: after[key] for key in known if key in after}
        assert same == {key: known[key] for key in same}
        gone = known.keys() - after.keys()
        # Helm deletes these: alerts and dashboard are another chart's, and another Job is another name.
        assert {key.partition("/")[0] for key in gone} <= {"ConfigMap", "PrometheusRule", "Job"}
