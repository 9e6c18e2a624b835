"""What `helm upgrade` does depends on the cluster: here Helm asks an API server that knows it in part."""

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


def _resource(plural: str, kind: str) -> dict[str, Any]:
    return {
        "name": plural,
        "singularName": kind.lower(),
        "namespaced": True,
        "kind": kind,
        "verbs": ["get"],
    }


def _group(name: str) -> dict[str, Any]:
    version = {"groupVersion": f"{name}/v1", "version": "v1"}
    return {"name": name, "versions": [version], "preferredVersion": version}


CLAIMS = [_resource("persistentvolumeclaims", "PersistentVolumeClaim")]
DISCOVERY: Mapping[str, Any] = {
    "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": CLAIMS},
    "/apis": {"kind": "APIGroupList", "groups": [_group("batch"), _group("apps")]},
    "/apis/batch/v1": {
        "kind": "APIResourceList",
        "groupVersion": "batch/v1",
        "resources": [_resource("jobs", "Job")],
    },
    "/apis/apps/v1": {
        "kind": "APIResourceList",
        "groupVersion": "apps/v1",
        "resources": [_resource("deployments", "Deployment")],
    },
}
MISSING = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}


@contextmanager
def api_server(known: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Its address; ``known``: by plural, what every object of that kind that it is asked for says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            answer = DISCOVERY.get(path, MISSING)
            *_, plural, name = path.split("/")
            if plural in known:
                answer = {"metadata": {"name": name}, **known[plural]}
            body = json.dumps(answer).encode()
            self.send_response(404 if answer is MISSING else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with serving(Handler) as url:
        yield url


CLAIM = {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}


def upgraded(helm: Path, known: Mapping[str, Mapping[str, Any]], *sets: str) -> list[dict[str, Any]]:
    """What `helm upgrade` would send to a cluster with ``known``."""
    given = ",".join(("model.name=me/model,monitoring.podMonitor=false", *sets))
    with api_server(known) as url:
        command = [str(helm), "template", "a", str(CHART), "--is-upgrade", "--skip-tests", "--set", given]
        command += ["--dry-run=server", "--kube-apiserver", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


@pytest.mark.parametrize(
    ("status", "waits"),
    [({"succeeded": 1}, False), ({"active": 1}, True), ({"failed": 1}, True), (None, True)],
    ids=str,
)
def test_an_upgrade_waits_for_a_model_that_is_not_there(
    status: Mapping[str, int] | None, waits: bool, helm3: Path
) -> None:
    """And for no pod where the download was done: most upgrades change no model."""
    known = {"persistentvolumeclaims": CLAIM}
    if status is not None:
        known["jobs"] = {"apiVersion": "batch/v1", "kind": "Job", "status": status}
    jobs = [item["metadata"]["name"] for item in upgraded(helm3, known) if item["kind"] == "Job"]
    assert [name.endswith("-before") for name in jobs] == ([False, True] if waits else [False])


def test_an_upgrade_does_not_wait_for_a_claim_that_it_is_to_make(helm3: Path) -> None:
    """Helm makes the claim after the hook, whose pod would be Pending for as long as Helm waits."""
    jobs = [item["metadata"]["name"] for item in upgraded(helm3, {}) if item["kind"] == "Job"]
    assert [name.endswith("-before") for name in jobs] == [False]


@pytest.mark.parametrize(("live", "wanted"), [(5, 5), (1, 2), (None, None)])
def test_autoscaling_begins_with_the_engines_there_are(
    live: int | None, wanted: int | None, helm3: Path
) -> None:
    """Without a number in the Deployment, switching autoscaling on would leave one engine."""
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replicas": live}}
    known = {} if live is None else {"deployments": deployment}
    scaled = ("autoscaling.enabled=true", "autoscaling.minReplicas=2", "monitoring.podMonitor=true")
    (engines,) = [
        item
        for item in upgraded(helm3, known, *scaled)
        if item["metadata"]["name"] == "a-engine" and item["kind"] == "Deployment"
    ]
    assert engines["spec"].get("replicas") == wanted
