"""Values that must not render: what the schema refuses, and what arithmetic refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from k8s.render import render
from lt_sglang.config import DECIDE, LIST, MODES, SCORES, parse_lazy_layers
from lt_sglang.errors import LightTransferError

from .chart import CHART, MINIMAL

SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))

REFUSED_BY_SCHEMA = {
    "unknown-key": "engin.replicas=1",
    "unknown-nested-key": "engine.tensorparallel=4",
    "unknown-deep-key": "engine.gpu.count=4",
    "text-for-a-number": "engine.replicas=two",
    "a-bad-list": "lightTransfer.lazyLayers=5..24",
    "a-mode-that-does-not-exist": "lightTransfer.mode=magic",
    "a-short-window": "autoscaling.scaleDownSeconds=60",
    "a-bad-digest": "image.digest=abc",
    "a-fraction-above-one": "engine.gpu.memoryFraction=1.5",
    "a-path-outside-the-volume": "model.path=/etc/model",
    "an-address-of-no-object-store": "model.url=http://mirror/model",
    "a-job-that-does-not-exist": "job.command=train",
    "a-share-above-all": "httpRoute.canary.weight=101",
    "a-policy-that-does-not-exist": "gateway.policy=best",
    "a-resource-of-kubernetes": "engine.extraResources.memory=1",
    "a-name-of-old": "lightTransfer.expectedTokens=8192",
}
REFUSED_BY_ARITHMETIC = {
    "no-model": (("model.name=",), "model.name: required"),
    "two-places": (
        ("model.path=/models/a", "modelCache.existingClaim=a", "model.url=s3://b/a"),
        "model.path is another place",
    ),
    "job-without-a-folder": (("job.command=eval", "model.url=s3://b/a"), "model.url is none"),
    "path-without-claim": (("model.path=/models/a",), "modelCache.existingClaim"),
    "tp-over-node": (("engine.tensorParallel=16",), "more than a node's 8"),
    "tp-not-a-divisor": (("engine.tensorParallel=3",), "does not divide the 8 GPUs"),
    "two-nodes-in-a-deployment": (("engine.nodesPerReplica=2",), "LeaderWorkerSet"),
    "one-node-in-a-group": (("engine.kind=LeaderWorkerSet",), "at least 2"),
    "gpus-twice": (("engine.extraResources.nvidia\\.com/gpu=4",), "follows from engine.tensorParallel"),
    "group-not-filled": (
        ("engine.kind=LeaderWorkerSet", "engine.nodesPerReplica=2", "engine.tensorParallel=8"),
        "2 nodes of 8 GPUs have 16",
    ),
    "heads": (("engine.tensorParallel=8", "model.attentionHeads=36"), "36 attention heads"),
    "kv-heads": (("engine.tensorParallel=8", "model.kvHeads=6"), "6 KV heads"),
    "weights": (("model.weightsGiB=132", "engine.tensorParallel=1"), "132.0 GiB of weights"),
    "weights-at-two": (("model.weightsGiB=140", "engine.tensorParallel=2"), "70.0 GiB of weights"),
    "shared-memory": (("engine.memoryGiB=40",), "engine.memoryGiB"),
    "too-many-nodes": (
        ("engine.tensorParallel=4", "engine.replicas=5", "engine.clusterNodes=2"),
        "need 3 nodes",
    ),
    "scaled-too-far": (
        ("engine.tensorParallel=8", "autoscaling.enabled=true", "engine.clusterNodes=2"),
        "4 replicas of 8 GPUs need 4 nodes",
    ),
    "scaling-blind": (("autoscaling.enabled=true", "monitoring.podMonitor=false"), "monitoring.podMonitor"),
    "score-in-static-mode": (("lightTransfer.score=squeeze",), "are for dynamic"),
    "flag-twice": (("engine.extraArgs={--tp-size=2}",), "--tp-size, which has a value of its own"),
    "flag-abbreviated": (
        ("engine.extraArgs={--served-model=x}",),
        "--served-model is --served-model-name, which has a value of its own",
    ),
    "admin-key-as-a-flag": (("engine.extraArgs={--admin-api=x}",), "--admin-api is --admin-api-key"),
    "offered-to-everybody": (("gateway.serviceType=LoadBalancer",), "gateway.withoutKey=true"),
    "nodeport-to-everybody": (("gateway.serviceType=NodePort",), "engine.apiKeySecret.name"),
    "clients-as-operators": (
        ("engine.apiKeySecret.name=a", "adminKeySecret.name=a", "adminKeySecret.key=api-key"),
        "every client would be an operator",
    ),
    "memory-of-an-unknown-gpu": (("model.weightsGiB=10", "engine.gpu.product=GB300"), "engine.gpu.memoryGiB"),
    "memory-of-any-gpu": (("model.weightsGiB=10", "engine.gpu.product="), "engine.gpu.memoryGiB"),
    "one-nodes-volume": (
        ("modelCache.accessMode=ReadWriteOnce", "engine.replicas=4"),
        "4 pods read the volume",
    ),
    "one-nodes-volume-scaled": (
        ("modelCache.accessMode=ReadWriteOnce", "autoscaling.enabled=true"),
        "4 pods read the volume",
    ),
    "env-of-the-chart": (("engine.extraEnv[0].name=HF_HUB_OFFLINE",), "HF_HUB_OFFLINE is set twice or by"),
    "env-twice": (
        ("gateway.extraEnv[0].name=A", "gateway.extraEnv[1].name=A"),
        "gateway.extraEnv: A is set twice",
    ),
    "selector-label": (
        ("engine.podLabels.app\\.kubernetes\\.io/instance=other",),
        "app.kubernetes.io/instance is the chart's own label",
    ),
    "serving-label": (("gateway.podLabels.lt-sglang/serves=http",), "is the chart's own label"),
    "volume-of-the-chart": (("engine.extraVolumes[0].name=shm",), "shm is the chart's own volume"),
    "route-without-a-gateway": (
        ("httpRoute.enabled=true", "gateway.enabled=false"),
        "httpRoute.enabled: leads to the gateway",
    ),
    "route-from-nowhere": (("httpRoute.enabled=true", "gateway.withoutKey=true"), "httpRoute.parentRefs"),
    "route-for-everybody": (
        ("httpRoute.enabled=true", "httpRoute.parentRefs[0].name=a"),
        "httpRoute.enabled: offers the model",
    ),
    "pool-for-everybody": (
        ("inferencePool.enabled=true", "inferencePool.parentRefs[0].name=a"),
        "inferencePool.parentRefs: offers the model",
    ),
    "weight-for-nobody": (
        ("httpRoute.canary.weight=5",),
        "httpRoute.canary.release: missing",
    ),
    "queue-twice": (
        ("engine.queue=a", "engine.labels.kueue\\.x-k8s\\.io/queue-name=b"),
        "what engine.queue sets",
    ),
    "job-over-two-nodes": (
        (
            *("engine.kind=LeaderWorkerSet", "engine.nodesPerReplica=2"),
            "engine.tensorParallel=16",
            "job.command=eval",
        ),
        "job.command: a Job has one node's GPUs",
    ),
    "job-of-another-model": (("job.command=eval", "job.args={--model-path=x}"), "is what the chart sets"),
    "lt-flag": (("engine.extraArgs={--lt-mode=static}",), "--lt-mode has a value of its own"),
    "dynamic-only": (("lightTransfer.checkTables=true",), "are for dynamic"),
    "use-ray": (("engine.extraArgs={--use-ray}",), "load no plug-in"),
}


@pytest.mark.parametrize("program", ["helm3", "helm4"])
@pytest.mark.parametrize("setting", REFUSED_BY_SCHEMA.values(), ids=REFUSED_BY_SCHEMA)
def test_schema_refuses(setting: str, program: str, request: pytest.FixtureRequest) -> None:
    helm: Path = request.getfixturevalue(program)
    with pytest.raises(LightTransferError, match=r"(?i)schema"):
        render([], (*MINIMAL, setting), program=helm)


@pytest.mark.parametrize(("sets", "message"), REFUSED_BY_ARITHMETIC.values(), ids=REFUSED_BY_ARITHMETIC)
def test_arithmetic_refuses(sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(LightTransferError, match=message.replace("(", r"\(")) as caught:
        render([], (*MINIMAL, *sets))
    assert "\n" not in str(caught.value), "one sentence"


def test_what_just_fits_renders() -> None:
    render([], (*MINIMAL, "model.weightsGiB=132", "engine.tensorParallel=2", "model.kvHeads=8"))
    render([], (*MINIMAL, "engine.tensorParallel=4", "engine.replicas=4", "engine.clusterNodes=2"))


def test_defaults_keep_the_schema() -> None:
    jsonschema.validate(DEFAULTS, SCHEMA)


def objects(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in schema.get("properties", {}).items():
        yield f"{path}{name}", part
        yield from objects(part, f"{path}{name}.")


def test_schema_and_defaults_name_the_same_keys() -> None:
    described = {path for path, _ in objects(SCHEMA)} - {"global"}

    def keys(value: Any, path: str = "") -> Iterator[str]:
        for name, part in value.items():
            yield path + name
            if isinstance(part, dict) and f"{path}{name}.".startswith(tuple(f"{p}." for p in described)):
                yield from keys(part, f"{path}{name}.")

    free = ("nodeSelector.", "Labels.", "tolerations.", "affinity.")
    found = {path for path in keys(DEFAULTS) if not any(part in path for part in free)}
    optional = {path for path in described - found if path.startswith("gateway.allowFrom")}
    assert found == described - optional


def test_schema_knows_the_choices_that_exist() -> None:
    known = SCHEMA["properties"]["lightTransfer"]["properties"]
    assert set(known["mode"]["enum"]) == set(MODES)
    assert set(known["score"]["enum"]) - {None} == {*SCORES, LIST}
    assert set(known["decide"]["enum"]) - {None} == set(DECIDE)


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "5-24,26", "half", "all", "ends:0.5", "random:12", "pyramid:0.25"),
        *("ends", "half:0.5", "middle:0.5", "5-", "5..24", "none,5"),
    ],
)
def test_lazy_layers_are_spelled_as_on_the_command_line(text: str) -> None:
    pattern = SCHEMA["properties"]["lightTransfer"]["properties"]["lazyLayers"]["pattern"]
    try:
        parse_lazy_layers(text)
        known = True
    except LightTransferError:
        known = False
    assert bool(re.search(pattern, text)) == known
