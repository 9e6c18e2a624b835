"""What `helm upgrade` does depends on the cluster: here Helm asks an API server that knows one Job."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ..http_server import serving
from .chart import CHART, objects

BATCH = {"groupVersion": "batch/v1", "version": "v1"}
JOBS = {"name": "jobs", "singularName": "job", "namespaced": True, "kind": "Job", "verbs": ["get"]}
DISCOVERY: Mapping[str, Any] = {
    "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
    "/apis": {
        "kind": "APIGroupList",
        "groups": [{"name": "batch", "versions": [BATCH], "preferredVersion": BATCH}],
    },
    "/apis/batch/v1": {"kind": "APIResourceList", "groupVersion": "batch/v1", "resources": [JOBS]},
}
MISSING = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}


@contextmanager
def api_server(status: Mapping[str, int] | None) -> Iterator[str]:
    """Its address; every Job it is asked for has ``status``, or there is none."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            answer = DISCOVERY.get(path, MISSING)
            if "/jobs/" in path and status is not None:
                name = path.rpartition("/")[2]
                answer = {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "metadata": {"name": name},
                    "status": status,
                }
            body = json.dumps(answer).encode()
            self.send_response(404 if answer is MISSING else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with serving(Handler) as url:
        yield url


@pytest.mark.parametrize(
    ("status", "waits"),
    [({"succeeded": 1}, False), ({"active": 1}, True), ({"failed": 1}, True), (None, True)],
    ids=str,
)
def test_an_upgrade_waits_for_a_model_that_is_not_there(
    status: Mapping[str, int] | None, waits: bool, helm3: Path
) -> None:
    """And for no pod where the download was done: most upgrades change no model."""
    sets = "model.name=me/model,monitoring.podMonitor=false,monitoring.rules=false"
    with api_server(status) as url:
        command = [str(helm3), "template", "a", str(CHART), "--is-upgrade", "--skip-tests", "--set", sets]
        command += ["--dry-run=server", "--kube-apiserver", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    jobs = [item["metadata"]["name"] for item in objects(done.stdout) if item["kind"] == "Job"]
    assert [name.endswith("-before") for name in jobs] == ([False, True] if waits else [False])
