"""Every values file: rendered by Helm 3 and 4 alike, as committed, valid for every Kubernetes version."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.chart_docs import CHARTS, documents
from k8s.render import CHART, MANIFESTS, MONITORING, RAY, made, main, render
from lt_sglang.planner.shapes import CONFIGS

from .chart import KUBERNETES, VALUES, Object, builtin, custom, faults, objects, template

Part = Callable[[Iterable[Object]], list[Object]]

# Each switch the other way, so that every template is validated with and without it.
SWITCHES = (
    "autoscaling.enabled=true",
    "engine.apiKeySecret.name=keys",
    "gateway.enabled=false",
    "image.digest=sha256:" + "0" * 64,
    "image.pullSecrets={registry}",
    "modelCache.existingClaim=mine",
    "modelCache.existingClaim=mine,model.path=/models/mine",
    "model.tokenSecret.name=hub",
    "model.url=s3://bucket/folder,engine.serviceAccountAnnotations.a=b,compileCache.size=20Gi",
    "monitoring.podMonitor=false",
    "monitoring.objectives.ttftSeconds=8,monitoring.objectives.minimumRequests=50,monitoring.labels.release=prom",
    "networkPolicy.enabled=false",
    "engine.kind=LeaderWorkerSet,engine.nodesPerReplica=2,engine.tensorParallel=16,autoscaling.enabled=true",
    "engine.extraResources.rdma/hca_shared_devices_a=1,gateway.serviceType=LoadBalancer,gateway.withoutKey=true",
    "adminKeySecret.name=operators,engine.gpu.product=,engine.maxSurge=1,engine.maxUnavailable=0",
    "engine.extraVolumes[0].name=ca,engine.extraVolumes[0].configMap.name=ca,"
    "engine.extraVolumeMounts[0].name=ca,engine.extraVolumeMounts[0].mountPath=/etc/ca",
    "engine.extraInitContainers[0].name=wait,engine.extraInitContainers[0].image=busybox",
    "engine.podSecurityContext.supplementalGroups={44},engine.securityContext.procMount=Default",
    "engine.probes.liveness.failureThreshold=10,engine.labels.kueue\\.x-k8s\\.io/queue-name=llm",
    "gateway.serviceAnnotations.a=b,gateway.labels.a=b,gateway.podLabels.a=b,gateway.podAnnotations.a=b",
    "gateway.extraEnv[0].name=RUST_LOG,gateway.extraEnv[0].value=info",
    "modelCache.tolerations[0].operator=Exists,modelCache.nodeSelector.disk=ssd,"
    "modelCache.extraEnv[0].name=HTTPS_PROXY,modelCache.extraEnv[0].value=http://proxy:3128",
    "networkPolicy.engineEgress[0].ports[0].port=4317,networkPolicy.apiServerCidrs={203.0.113.7/32}",
    "engine.podAnnotations.a=b,engine.priorityClassName=high,engine.runtimeClassName=nvidia",
    "engine.extraEnv[0].name=NCCL_DEBUG,engine.extraEnv[0].value=INFO",
    "gateway.allowFrom[0].namespaceSelector.matchLabels.team=chat",
    "httpRoute.enabled=true,httpRoute.parentRefs[0].name=public,httpRoute.parentRefs[0].namespace=gateways,"
    "httpRoute.hostnames={llm.example.com},httpRoute.pathPrefix=/chat,httpRoute.headers.X-Model=chat,"
    "httpRoute.canary.release=canary,httpRoute.canary.weight=5,engine.apiKeySecret.name=keys",
    "inferencePool.enabled=true,inferencePool.parentRefs[0].name=public,gateway.withoutKey=true,"
    "inferencePool.allowFrom[0].namespaceSelector.matchLabels.a=b",
    "canaryOf=other,compileCache.size=20Gi,modelCache.keep=false",
    "job.command=calibrate,job.args={--out=/work/list.json},job.claim=work,engine.queue=llm",
    "tracing.endpoint=otel:4317,tracing.collectors[0].namespaceSelector.matchLabels.a=b",
    "autoscaling.enabled=true,autoscaling.triggers[0].type=cron,autoscaling.triggers[0].metadata.timezone=UTC",
    "engine.kind=LeaderWorkerSet,engine.nodesPerReplica=2,engine.tensorParallel=16,engine.queue=llm,"
    "engine.schedulerName=volcano",
)


QWEN2 = json.dumps(CONFIGS["qwq-32b"])


def test_manifests_are_those_of_the_values_files() -> None:
    """`make manifests` was run after the last change of a chart."""
    files = made()
    folders = {file.parent for file in files}
    assert {file for folder in folders for file in folder.glob("*.yaml")} == files.keys()
    for file, text in files.items():
        assert file.read_text(encoding="utf-8") == text, f"{file} is old: python k8s/render.py --all"


def test_a_manifest_can_be_read() -> None:
    """Alerts and dashboard stand once, in a file of their own."""
    texts = {file.name: file.read_text(encoding="utf-8") for file in MANIFESTS.glob("*.yaml")}
    assert {name: text.count("\n") for name, text in texts.items() if text.count("\n") > 750} == {}
    assert [name for name, text in texts.items() if "alert: LtSglang" in text] == ["monitoring.yaml"]
    assert [name for name, text in texts.items() if "lt-sglang.json" in text] == ["monitoring.yaml"]


@pytest.mark.parametrize("chart", [CHART, MONITORING, RAY], ids=lambda chart: chart.name)
def test_schema_and_readme_are_those_of_the_values(chart: Path) -> None:
    """`make manifests` was run after the last change of a chart's values.yaml."""
    assert chart in CHARTS.iterdir()
    for file, text in documents(chart).items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name} is old: python k8s/chart_docs.py"


@pytest.mark.parametrize("part", [builtin, custom])
def test_monitoring_is_valid(part: Part) -> None:
    found = part(objects(render([], chart=MONITORING)))
    assert len(found) == 1
    assert [fault for version in KUBERNETES for item in found for fault in faults(item, version)] == []


def test_monitoring_has_the_values_given(tmp_path: Path) -> None:
    """Objectives and the address of the runbook; what is in the files is what Prometheus gets."""
    values = tmp_path / "values.json"
    values.write_text(
        json.dumps(
            {"objectives": {"ttftSeconds": 9.5}, "runbookUrl": "https://wiki/lt", "labels": {"a": "b"}}
        )
    )
    for file, ttft, runbook in (
        (None, "vector(4)", "docs/operations.md"),
        (values, "vector(9.5)", "https://wiki/lt"),
    ):
        (rule,) = custom(objects(render([file] if file else [], chart=MONITORING)))
        groups = {group["name"]: group["rules"] for group in rule["spec"]["groups"]}
        assert groups["lt-sglang-defaults"][0] == {"record": "lt:default:ttft_seconds", "expr": ttft}
        urls = {alert["annotations"]["runbook_url"].partition("#")[0] for alert in groups["lt-sglang-alerts"]}
        assert urls == {runbook}
    assert rule["metadata"]["labels"]["a"] == "b"
    names = {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in MONITORING.glob("files/*.yaml")
    }
    assert [group["name"] for part in ("objectives", "alerts") for group in names[part]["groups"]] == list(
        groups
    )


@pytest.mark.parametrize("name", VALUES)
def test_helm_3_and_4_agree(name: str, helm3: Path, helm4: Path) -> None:
    ours = [objects(render([VALUES[name]], program=program)) for program in (helm3, helm4)]
    assert ours[0] == ours[1]


# Kinds of their own are checked apart: they need definitions that a clone may not have.
@pytest.mark.parametrize("part", [builtin, custom])
@pytest.mark.parametrize("name", VALUES)
def test_valid_for_every_kubernetes(name: str, part: Part) -> None:
    found = part(template(values=name))
    assert found
    assert [fault for version in KUBERNETES for item in found for fault in faults(item, version)] == []


@pytest.mark.parametrize("part", [builtin, custom])
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_is_valid(switch: str, part: Part) -> None:
    versions, found = (KUBERNETES[0], KUBERNETES[-1]), part(template(switch))
    assert [fault for version in versions for item in found for fault in faults(item, version)] == []


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Deployment", {"surge": 1}),
        ("PodMonitor", {"podMetricEndpoints": []}),
        ("NetworkPolicy", {"ingres": []}),
        ("ServiceAccount", {"daten": {}}),
    ],
)
def test_the_validation_itself(kind: str, change: dict[str, Any]) -> None:
    """A key that does not exist is a fault."""
    item = next(item for item in template() if item["kind"] == kind)
    assert faults(item, KUBERNETES[-1]) == []
    wrong = {**item, "spec": {**item["spec"], **change}} if "spec" in item else {**item, **change}
    assert faults(wrong, KUBERNETES[-1])


@pytest.mark.parametrize("name", VALUES)
def test_names_are_unique_and_in_the_namespace(name: str) -> None:
    found = template(values=name)
    names = [(item["kind"], item["metadata"]["name"]) for item in found]
    assert len(set(names)) == len(names)
    assert {item["metadata"]["namespace"] for item in found} == {"lt-sglang"}


def test_one_command_for_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a config.json, as a new user has it: heads, weights and context are read from it."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,'
        '"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,'
        '"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 32768}'
    )
    asked = [
        str(folder),
        "--lt-lazy-layers",
        "8-23",
        "--tp",
        "2",
        "--lt-kv-bytes",
        "34359738368",
        "--claim",
        "models",
    ]
    assert main(asked) == 0
    text = capsys.readouterr().out
    found = objects(text)
    assert [fault for item in builtin(found) for fault in faults(item, KUBERNETES[-1])] == []
    for part in ("--lt-kv-bytes=34359738368", "--context-length=32768", "--model-path=/models/my-model"):
        assert part in text
    assert main([*asked, "--tp", "16"]) == 2
    assert "LeaderWorkerSet" in capsys.readouterr().err


def test_one_command_for_dynamic_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Needs no list: the ends of the stack are lazy for short prompts."""
    (tmp_path / "config.json").write_text(QWEN2)
    asked = ["me/my-model", "--config", str(tmp_path), "--tp", "4", "--lt-mode", "dynamic", "--lt-keep"]
    assert main([*asked, "0.75"]) == 0
    text = capsys.readouterr().out
    assert [fault for item in builtin(objects(text)) for fault in faults(item, KUBERNETES[-1])] == []
    for part in ("--lt-mode=dynamic", "--lt-keep=48", "--lt-lazy-layers=0-7,56-63"):
        assert part in text
    assert main([*asked, "64"]) == 2
    assert "keep: 64 of 64 layers" in capsys.readouterr().err
    assert main([*asked, "most"]) == 2
    assert main(["me/my-model", "--config", str(tmp_path), "--lt-lazy-layers", "1-9", "--lt-keep", "9"]) == 2
    assert "only with --lt-mode dynamic" in capsys.readouterr().err


def test_known_models_need_no_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(QWEN2)
    assert main(["cxdu/QwQ-32B-LightTransfer", "--config", str(tmp_path), "--tp", "4"]) == 0
    text = capsys.readouterr().out
    assert "--lt-sink-tokens=129" in text and "--model-path=/models/main/cxdu/QwQ-32B-LightTransfer" in text
    assert main(["cxdu/QwQ-32B-LightTransfer", "--config", str(tmp_path), "--tp", "16"]) == 2
    assert main(["cxdu/Another-32B", "--config", str(tmp_path)]) == 2
    assert "lazy layers: none are known" in capsys.readouterr().err


@pytest.mark.parametrize("chart", [CHART, MONITORING, RAY], ids=lambda chart: chart.name)
def test_chart_version_is_the_packages(chart: Path) -> None:
    import lt_sglang

    read = yaml.safe_load((chart / "Chart.yaml").read_text(encoding="utf-8"))
    assert read["appVersion"] == lt_sglang.__version__
