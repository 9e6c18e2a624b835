"""One test a template: what it must say, and when it must not be there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from k8s.render import render

from ..http_server import serving
from .chart import CHART, MINIMAL, container, flags, kinds, objects, one, template

LWS = ("engine.kind=LeaderWorkerSet", "engine.nodesPerReplica=2", "engine.tensorParallel=16")
ENGINE = "lt-sglang-engine"
GATEWAY = "lt-sglang-gateway"


def engine(*sets: str, values: str | None = None) -> dict:
    return one(template(*sets, values=values), "Deployment", ENGINE)


def pod(workload: dict) -> dict:
    return workload["spec"]["template"]["spec"]


def pods(found: list[dict]) -> list[dict]:
    return [pod(item) for item in found if item["kind"] == "Deployment"]


def pod_labels(workload: dict) -> dict:
    return workload["spec"]["template"]["metadata"]["labels"]


def test_every_template_has_a_test() -> None:
    from . import test_templates_gateway, test_templates_routes

    names = {file.stem for file in (CHART / "templates").rglob("*.yaml")}
    defined = {*globals(), *vars(test_templates_gateway), *vars(test_templates_routes)}
    tested = {name.removeprefix("test_").replace("_", "-") for name in defined if name.startswith("test_")}
    assert names <= tested, names - tested


def test_engine_deployment() -> None:
    found = engine(
        "lightTransfer.lazyLayers=5-24\\,26",
        "lightTransfer.sinkTokens=0",
        "lightTransfer.kvBytes=34359738368",
        "engine.tensorParallel=4",
        "engine.contextLength=32768",
        "engine.extraArgs={--random-seed=1}",
    )
    engine_container = container(found)
    given = flags(engine_container)
    assert engine_container["args"][0] == "serve"
    assert given["--lt-lazy-layers"] == "5-24,26"
    assert given["--lt-sink-tokens"] == "0", "zero is a value, not an absence"
    assert given["--lt-kv-bytes"] == "34359738368", "not 3.4e+10"
    assert "--lt-recent-tokens" not in given
    assert given["--tp-size"] == "4" and given["--context-length"] == "32768"
    assert "--enable-metrics" in given and given["--random-seed"] == "1"
    assert engine_container["resources"]["limits"] == engine_container["resources"]["requests"]
    assert engine_container["resources"]["limits"]["nvidia.com/gpu"] == 4
    more = container(engine("engine.extraResources.rdma/hca=2"))["resources"]
    assert more["limits"]["rdma/hca"] == more["requests"]["rdma/hca"] == 2
    rolling = found["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 0, "maxUnavailable": 1}, "no spare node"
    assert found["spec"]["template"]["metadata"]["labels"]["lt-sglang/serves"] == "http"


def test_engine_in_dynamic_mode() -> None:
    dynamic = [
        f"lightTransfer.{pair}"
        for pair in ("mode=dynamic", "keep=40", "score=residual-error", "decide=prompt", "lastQueries=8")
    ]
    given = flags(container(engine(*dynamic)))
    wanted = {
        "mode": "dynamic",
        "keep": "40",
        "score": "residual-error",
        "decide": "prompt",
        "last-queries": "8",
    }
    assert {f"--lt-{name}": value for name, value in wanted.items()}.items() <= given.items()
    assert "--lt-check-tables" not in given


def test_engine_probes_leave_time() -> None:
    probes = container(engine("engine.startupMinutes=40"))
    startup, ready, live = (probes[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
    assert startup["httpGet"]["path"] == "/health_generate" and startup["timeoutSeconds"] == 30
    assert startup["periodSeconds"] * startup["failureThreshold"] == 40 * 60
    assert ready["httpGet"]["path"] == "/ready" and ready["timeoutSeconds"] == 5
    assert live["timeoutSeconds"] > 20, "SGLang itself waits 20 s before it calls itself unhealthy"


def test_engine_drains() -> None:
    found = engine("engine.drainSeconds=900", "engine.preStopSeconds=10")
    assert pod(found)["terminationGracePeriodSeconds"] >= 900 + 10 + 20
    assert container(found)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "10"]
    gateway = one(template("engine.drainSeconds=900"), "Deployment", GATEWAY)
    assert pod(gateway)["terminationGracePeriodSeconds"] > int(
        flags(container(gateway))["--shutdown-grace-period-secs"]
    )


def test_engine_shared_memory_is_counted() -> None:
    found = engine("engine.sharedMemoryGiB=32", "engine.memoryGiB=200")
    (shm,) = [volume for volume in pod(found)["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert container(found)["resources"]["limits"]["memory"] == "200Gi"
    assert {"name": "shm", "mountPath": "/dev/shm"} in container(found)["volumeMounts"]


def test_every_pod_is_confined() -> None:
    for item in (*template(), *template(*LWS)):
        if item["kind"] not in ("Deployment", "Job"):
            continue
        spec = pod(item)
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 10000
        for each in (*spec["containers"], *spec.get("initContainers", [])):
            context = each["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_secrets_by_reference_only() -> None:
    sets = ("engine.apiKeySecret.name=keys", "model.tokenSecret.name=hub")
    found = template(*sets)
    assert "Secret" not in kinds(found)
    for name in (ENGINE, GATEWAY):
        each = container(one(found, "Deployment", name))
        (key,) = [env for env in each["env"] if env["name"] == "LT_API_KEY"]
        assert key["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "api-key"}
        assert flags(each)["--api-key"] == "$(LT_API_KEY)"
    operators = template("adminKeySecret.name=operators")
    for name, variable in ((ENGINE, "LT_SGLANG_ADMIN_API_KEY"), (GATEWAY, "LT_ADMIN_KEY")):
        each = container(one(operators, "Deployment", name))
        (key,) = [env for env in each["env"] if env["name"] == variable]
        assert key["valueFrom"]["secretKeyRef"] == {"name": "operators", "key": "admin-key"}
        assert not [arg for arg in each["args"] if "admin" in arg], "no key in a list of processes"
    (token,) = [env for env in container(one(found, "Job"))["env"] if env["name"] == "HF_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"]["name"] == "hub"


def test_engine_leaderworkerset() -> None:
    found = template(*LWS, "engine.podAnnotations.a=b")
    assert ("Deployment", ENGINE) not in [(item["kind"], item["metadata"]["name"]) for item in found]
    group = one(found, "LeaderWorkerSet")["spec"]
    parts = group["leaderWorkerTemplate"]
    assert parts["size"] == 2 and parts["restartPolicy"] == "RecreateGroupOnPodRestart"
    leader, worker = parts["leaderTemplate"], parts["workerTemplate"]
    given = flags(leader["spec"]["containers"][0])
    assert given["--nnodes"] == "$(LWS_GROUP_SIZE)" and given["--node-rank"] == "$(LWS_WORKER_INDEX)"
    assert leader["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert leader["metadata"]["labels"]["lt-sglang/serves"] == "http"
    assert "lt-sglang/serves" not in worker["metadata"]["labels"], "other nodes answer no requests"
    assert "readinessProbe" not in worker["spec"]["containers"][0]
    assert leader["metadata"]["annotations"] == worker["metadata"]["annotations"] == {"a": "b"}


def test_engine_service() -> None:
    service = one(template(), "Service", ENGINE)["spec"]
    assert service["selector"]["lt-sglang/serves"] == "http"
    assert service["ports"][0]["port"] == 30000


def test_engine_serviceaccount() -> None:
    account = one(template(), "ServiceAccount", ENGINE)
    assert account["automountServiceAccountToken"] is False
    assert pod(engine())["automountServiceAccountToken"] is False


def test_engine_pdb() -> None:
    budget = one(template(), "PodDisruptionBudget", ENGINE)["spec"]
    assert budget["maxUnavailable"] == 1 and budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    group = template(*LWS)
    chosen = one(group, "PodDisruptionBudget", ENGINE)["spec"]["selector"]["matchLabels"].items()
    parts = one(group, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    for part in ("leaderTemplate", "workerTemplate"):
        assert chosen <= parts[part]["metadata"]["labels"].items(), "an engine is gone with any of its pods"
    assert not chosen <= pod_labels(one(group, "Deployment", GATEWAY)).items()


def test_models_pvc() -> None:
    claim = one(template("modelCache.storageClass=fast"), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["storageClassName"] == "fast"
    assert "PersistentVolumeClaim" not in kinds(template("modelCache.existingClaim=mine"))


def test_models_job() -> None:
    found = template("model.name=me/My-Model", "model.revision=v2")
    job = one(found, "Job")
    env = {item["name"]: item.get("value") for item in container(job)["env"]}
    assert env["TARGET"] == "/models/v2/me/My-Model", "another owner's is another model"
    deployment = one(found, "Deployment", ENGINE)
    assert flags(container(deployment))["--model-path"] == env["TARGET"]
    (wait,) = pod(deployment)["initContainers"]
    assert wait["args"][1] == "/models/v2/me/My-Model/.complete"
    changes = (
        "model.revision=v3",
        "modelCache.downloadMemory=9Gi",
        "model.tokenSecret.name=hub",
        "image.tag=new",
    )
    names = {one(template("model.name=me/My-Model", change), "Job")["metadata"]["name"] for change in changes}
    assert len({*names, job["metadata"]["name"]}) == 5, "a Job cannot be changed"
    mine = template("modelCache.existingClaim=mine", "model.path=/models/mine")
    assert "Job" not in kinds(mine)
    assert "initContainers" not in pod(one(mine, "Deployment", ENGINE))


def test_weights_out_of_an_object_store() -> None:
    """No volume, no download and no waiting; the engine may reach the store, by a role if there is one."""
    found = template("model.name=", "model.url=s3://bucket/a/b", "engine.serviceAccountAnnotations.role=r")
    assert not {"Job", "PersistentVolumeClaim"} & set(kinds(found)) and "models" not in json.dumps(
        pods(found)
    )
    deployment = one(found, "Deployment", ENGINE)
    assert flags(container(deployment))["--model-path"] == "s3://bucket/a/b"
    assert "initContainers" not in pod(deployment)
    egress = one(found, "NetworkPolicy", ENGINE)["spec"]["egress"]
    assert {"ports": [{"port": 443, "protocol": "TCP"}]} in egress
    assert one(found, "ServiceAccount", ENGINE)["metadata"]["annotations"] == {"role": "r"}


def test_models_are_there_before_an_upgrade_begins() -> None:
    """A hook that Helm waits for: the same pod as the Job's, which then finds the model."""
    upgraded = objects(render([], (*MINIMAL, "modelCache.existingClaim=mine"), upgrade=True))
    job, hook = (item for item in upgraded if item["kind"] == "Job")
    assert hook["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"
    assert hook["spec"].pop("ttlSecondsAfterFinished"), "Helm does not take a hook away that failed"
    assert hook["spec"] == job["spec"] and "annotations" not in job["metadata"]
    assert hook["metadata"]["name"] == f"{job['metadata']['name']}-before"
    # A claim of the chart's own may not be there yet: Helm makes it after the hook.
    assert [item["kind"] for item in objects(render([], MINIMAL, upgrade=True))].count("Job") == 1


def test_pods_do_not_change_with_the_chart(tmp_path: Path) -> None:
    """Another version of the chart does not start engines again, nor ask for another download."""
    other = tmp_path / "chart"
    shutil.copytree(CHART, other)
    chart = other / "Chart.yaml"
    chart.write_text(re.sub(r"(?m)^version: .*", "version: 99.0.0", chart.read_text(encoding="utf-8")))
    changed = objects(render([], MINIMAL, chart=other))
    for mine, theirs in zip(template(), changed, strict=True):
        assert mine["metadata"]["name"] == theirs["metadata"]["name"]
        assert mine["metadata"]["labels"] != theirs["metadata"]["labels"]
        if mine["kind"] in ("Deployment", "Job"):
            assert mine["spec"] == theirs["spec"]


def test_models_job_script(tmp_path: Path) -> None:
    """The script itself, with another program in place of `hf`: it marks what is whole, and only that."""
    (script,) = container(one(template(), "Job"))["args"]
    tool = tmp_path / "bin" / "hf"
    tool.parent.mkdir()
    target = tmp_path / "target"
    env = {"PATH": f"{tool.parent}:/usr/bin:/bin", "MODEL": "m", "REVISION": "r", "TARGET": str(target)}

    def run(body: str) -> int:
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        return subprocess.run(["sh", "-ec", script], env=env).returncode

    assert run(f"mkdir -p {target}; exit 1") != 0
    assert not (target / ".complete").exists()
    wanted = f"download m --revision r --local-dir {target} --exclude original/*"
    assert run(f'[ "$*" = "{wanted}" ]') == 0
    assert (target / ".complete").exists()
    assert run("exit 1") == 0, "a second run finds it there"


def test_completion(helm4: Path) -> None:
    """`helm test`: left out of the plain manifests, and its program runs."""
    assert "Pod" not in kinds(template())
    command = [str(helm4), "template", "x", str(CHART), "--set", "model.name=m", "--show-only"]
    text = subprocess.run(
        [*command, "templates/tests/completion.yaml"], capture_output=True, text=True
    ).stdout
    assert "helm.sh/hook: test" in text and "value: http://x-gateway:8000/v1/completions" in text
    code = (CHART / "files" / "completion.py").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", code], env={"URL": "http://127.0.0.1:9", "MODEL": "m"})
    assert done.returncode != 0, "no gateway, no success"


@pytest.mark.parametrize(("tokens", "key", "success"), [(8, "k", True), (0, "k", False), (8, "other", False)])
def test_completion_judges_the_answer(tokens: int, key: str, success: bool) -> None:
    """Its program against a gateway's stand-in: a completion with tokens, for the key of the Secret."""

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = asked["model"] == "m" and self.headers["Authorization"] == "Bearer k"
            self.send_response(200 if known else 401)
            self.end_headers()
            reply = {"usage": {"completion_tokens": tokens}, "choices": [{"text": " Paris"}]}
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_: object) -> None:
            pass

    code = (CHART / "files" / "completion.py").read_text(encoding="utf-8")
    with serving(Gateway) as url:
        env = {"URL": f"{url}/v1/completions", "MODEL": "m", "LT_API_KEY": key}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == success, done.stderr
    assert ("Paris" in done.stdout) == success


def test_notes(helm4: Path) -> None:
    command = [str(helm4), "install", "x", str(CHART), "--set", "model.name=m", "--dry-run=client"]
    notes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "an upgrade is an outage" in notes and "helm test x" in notes
    assert "lazy layers as the model says" in notes
    command += ["--set", "lightTransfer.mode=dynamic,lightTransfer.lazyLayers=1-2"]
    notes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "mode dynamic, lazy layers each request's own" in notes


@pytest.mark.parametrize("name", ["llama-3-70b-tp8", "llama-3-70b-tp4", "qwq-32b-tp2", "qwq-32b-tp4"])
def test_values_files_fill_a_node(name: str) -> None:
    """Together the engines of a values file use eight GPUs, and the memory of a node with 1 TiB."""
    found = engine(values=name)
    limits = container(found)["resources"]["limits"]
    replicas = (
        found["spec"].get("replicas") or one(template(values=name), "ScaledObject")["spec"]["minReplicaCount"]
    )
    assert replicas * limits["nvidia.com/gpu"] == 8
    assert replicas * int(limits["memory"].removesuffix("Gi")) <= 960
    assert replicas * limits["cpu"] <= 48
