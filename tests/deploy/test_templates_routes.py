"""As test_templates.py: ways in (Gateway API, InferencePool), Jobs, traces, compiled kernels, queues."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from .chart import Object, container, flags, one, template
from .test_templates import ENGINE, GATEWAY, LWS, engine, pod, pod_labels

ROUTE = ("httpRoute.enabled=true", "httpRoute.parentRefs[0].name=public", "gateway.withoutKey=true")
POOL = ("inferencePool.enabled=true", "gateway.withoutKey=true")
JOB = ("job.command=eval", "job.args={--out=/work/quality,--engine=full}")


def policy(found: list[Object], name: str) -> Any:
    return one(found, "NetworkPolicy", name)["spec"]


def selected(labels: dict[str, str], found: list[Object]) -> set[str]:
    """The workloads whose pods have ``labels``."""
    workloads = [item for item in found if item["kind"] in ("Deployment", "Job")]
    return {item["metadata"]["name"] for item in workloads if labels.items() <= pod_labels(item).items()}


def test_httproute() -> None:
    route = one(template(*ROUTE), "HTTPRoute")["spec"]
    (rule,) = route["rules"]
    assert route["parentRefs"] == [{"name": "public"}] and "filters" not in rule
    assert rule["backendRefs"] == [{"name": GATEWAY, "port": 8000, "weight": 100}]
    assert rule["timeouts"] == {"request": "1200s"}, "as the gateway's own"
    service = one(template(*ROUTE), "Service", GATEWAY)["spec"]["ports"][0]
    assert service["port"] == rule["backendRefs"][0]["port"]


def test_several_models_behind_one_address() -> None:
    """Two releases share a Gateway; a path or a header tells them apart, and engines see neither."""
    named = (*ROUTE, "httpRoute.pathPrefix=/chat", "httpRoute.headers.X-Gateway-Model-Name=chat")
    (rule,) = one(template(*named), "HTTPRoute")["spec"]["rules"]
    (match,) = rule["matches"]
    assert match["path"] == {"type": "PathPrefix", "value": "/chat"}
    assert match["headers"] == [{"name": "X-Gateway-Model-Name", "value": "chat"}]
    (rewrite,) = rule["filters"]
    assert rewrite["urlRewrite"]["path"] == {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}


def test_a_canary_gets_its_share_and_is_named_to_the_alert() -> None:
    shared = (*ROUTE, "httpRoute.canary.release=canary", "httpRoute.canary.weight=5")
    (rule,) = one(template(*shared), "HTTPRoute")["spec"]["rules"]
    weights = {ref["name"]: ref["weight"] for ref in rule["backendRefs"]}
    assert weights == {GATEWAY: 95, "canary-gateway": 5}
    canary = template("canaryOf=lt-sglang", "lightTransfer.lazyLayers=1-9")
    assert pod_labels(one(canary, "Deployment", ENGINE))["lt-sglang/canary-of"] == "lt-sglang"
    assert "lt-sglang/canary-of" in one(canary, "PodMonitor")["spec"]["podTargetLabels"]


def test_inferencepool() -> None:
    found = template(*POOL)
    pool = one(found, "InferencePool")["spec"]
    assert selected(pool["selector"]["matchLabels"], found) == {ENGINE}
    assert pool["targetPorts"] == [{"number": 30000}]
    picker = one(found, "Service", pool["endpointPickerRef"]["name"])["spec"]
    assert picker["ports"][0]["port"] == pool["endpointPickerRef"]["port"]["number"]
    assert "HTTPRoute" not in {item["kind"] for item in found}
    route = one(template(*POOL, "inferencePool.parentRefs[0].name=public"), "HTTPRoute")["spec"]
    assert route["rules"][0]["backendRefs"][0]["kind"] == "InferencePool"
    assert one(template(*POOL, "gateway.enabled=false"), "InferencePool")["spec"] == pool


def test_picker() -> None:
    """It may ask for pods and pools of its namespace, and reaches the engines."""
    found = template(*POOL, "inferencePool.allowFrom[0].namespaceSelector.matchLabels.a=b")
    deployment = one(found, "Deployment", "lt-sglang-picker")
    given = flags(container(deployment))
    assert given["--pool-name"] == one(found, "InferencePool")["metadata"]["name"]
    assert given["--total-queued-requests-metric"] == "sglang:num_queue_reqs"
    account = pod(deployment)["serviceAccountName"]
    assert one(found, "RoleBinding", account)["subjects"][0]["name"] == account
    inside = json.dumps(policy(found, ENGINE)["ingress"])
    assert '"picker"' in inside and '{"a": "b"}' in inside
    assert json.dumps(policy(found, "lt-sglang-picker")["egress"]).count('"engine"') == 1


def test_job() -> None:
    """An engine's image, model and GPUs; nothing reaches it, and no Service takes it for an engine."""
    found = template(*JOB, "engine.tensorParallel=4", "job.claim=results")
    job = one(found, "Job", next(o["metadata"]["name"] for o in found if "-eval-" in o["metadata"]["name"]))
    worker, served = container(job), container(one(found, "Deployment", ENGINE))
    assert worker["image"] == served["image"] and worker["resources"] == served["resources"]
    model = next(arg for arg in served["args"] if arg.startswith("--model-path="))
    assert worker["args"] == ["eval", model, "--out=/work/quality", "--engine=full"]
    assert job["spec"]["activeDeadlineSeconds"] == 12 * 3600
    volumes = {volume["name"]: volume for volume in pod(job)["volumes"]}
    assert volumes["work"]["persistentVolumeClaim"] == {"claimName": "results"}
    names = {mount["name"] for mount in worker["volumeMounts"]}
    assert names == set(volumes), "each volume is mounted"
    for selector in (one(found, "Service", ENGINE)["spec"]["selector"],):
        assert not selector.items() <= pod_labels(job).items()
    rules = policy(found, "lt-sglang-job")
    assert selected(rules["podSelector"]["matchLabels"], found) == {job["metadata"]["name"]}
    assert "ingress" not in rules and "egress" not in rules
    assert not [o for o in template() if "-eval-" in o["metadata"]["name"]]


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_a_jobs_flags_are_the_commands_own(command: str) -> None:
    """The command takes what docs/operations.md gives it, up to the model that is not here."""
    args = {
        "eval": ["--out=/tmp/x", "--engine=full", "--engine=half=--lt-mode dynamic", "--tasks=passkey"],
        "calibrate": ["--data=/nowhere.jsonl", "--out=/tmp/x.json", "--lt-keep=0.5"],
    }[command]
    run = [sys.executable, "-m", "lt_sglang", command, "--model-path=/models/none", *args]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "unrecognized" not in done.stderr and "usage:" not in done.stderr
    assert "/models/none" in done.stderr or "/nowhere.jsonl" in done.stderr, done.stderr[-500:]


def test_compile_cache_pvc() -> None:
    """Where a volume is given, kernels outlive their pod, in a folder of the image's own."""
    assert "LT_CACHE" not in json.dumps(template())
    found = template("compileCache.size=20Gi", "image.tag=1.2")
    claim = one(found, "PersistentVolumeClaim", "lt-sglang-kernels")
    assert claim["spec"]["resources"]["requests"]["storage"] == "20Gi"
    spec = pod(one(found, "Deployment", ENGINE))
    assert {"name": "LT_CACHE", "value": "/kernels/1.2"} in spec["containers"][0]["env"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["kernels"]["persistentVolumeClaim"] == {"claimName": "lt-sglang-kernels"}
    yours = template("compileCache.existingClaim=mine", "compileCache.size=20Gi")
    assert '"mine"' in json.dumps(pod(one(yours, "Deployment", ENGINE))["volumes"])
    assert "lt-sglang-kernels" not in json.dumps(yours)


def test_traces_reach_their_collector() -> None:
    sets = ("tracing.endpoint=otel.tracing:4317", "tracing.collectors[0].namespaceSelector.matchLabels.a=b")
    found = template(*sets)
    args = container(one(found, "Deployment", GATEWAY))["args"]
    assert "--enable-trace" in args and "--otlp-traces-endpoint=otel.tracing:4317" in args
    for name in (GATEWAY, ENGINE):
        (rule,) = [r for r in policy(found, name)["egress"] if '"a": "b"' in json.dumps(r)]
        assert rule["ports"] == [{"port": 4317, "protocol": "TCP"}]


def test_two_nodes_are_scheduled_together() -> None:
    """Kueue reads its queue from the LeaderWorkerSet; another scheduler is named in the pods."""
    found = template(*LWS, "engine.queue=llm", "engine.schedulerName=volcano", "engine.labels.team=chat")
    group = one(found, "LeaderWorkerSet")
    assert group["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "llm"
    assert group["metadata"]["labels"]["team"] == "chat"
    parts = group["spec"]["leaderWorkerTemplate"]
    for part in ("leaderTemplate", "workerTemplate"):
        assert parts[part]["spec"]["schedulerName"] == "volcano"
    assert "schedulerName" not in pod(engine())


def test_keda_scales_on_triggers_of_your_own() -> None:
    cron = "autoscaling.triggers[0].type=cron,autoscaling.triggers[0].metadata.timezone=UTC"
    own = ("autoscaling.enabled=true", *cron.split(","), "monitoring.podMonitor=false")
    scaled = one(template(*own), "ScaledObject")["spec"]
    assert scaled["triggers"] == [{"type": "cron", "metadata": {"timezone": "UTC"}}]


def test_the_models_claim_may_go_with_its_release() -> None:
    def kept(*sets: str) -> bool:
        claim = one(template(*sets), "PersistentVolumeClaim")
        return "helm.sh/resource-policy" in claim["metadata"].get("annotations", {})

    assert kept() and not kept("modelCache.keep=false")
