"""As test_templates.py: the templates of gateway, network, monitoring and scaling."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from k8s.render import render

from .chart import MONITORING, Object, container, flags, kinds, objects, one, template
from .test_templates import ENGINE, GATEWAY, LWS, engine


def test_gateway_deployment() -> None:
    gateway = container(one(template(), "Deployment", GATEWAY))
    args = gateway["args"]
    start = args.index("--selector") + 1
    selector = dict(pair.split("=") for pair in args[start : start + 3])
    labels = engine()["spec"]["template"]["metadata"]["labels"]
    assert selector.items() <= labels.items(), "it finds the engines' pods"
    given = flags(gateway)
    assert given["--policy"] == "power_of_two" and given["--health-check-endpoint"] == "/ready"
    assert given["--service-discovery-namespace"] == "lt-sglang"
    assert kinds(template("gateway.enabled=false")).count("Deployment") == 1


@pytest.mark.parametrize(("age", "lives"), [(0, True), (170, True), (300, False), (None, False)])
def test_the_container_beside_the_gateway_is_started_again_if_it_hangs(
    age: int | None, lives: bool, tmp_path: Path
) -> None:
    """By the age of a file that each of its rounds writes; the gateway's pod stays ready meanwhile."""
    (_, beside) = one(template(), "Deployment", GATEWAY)["spec"]["template"]["spec"]["containers"]
    assert beside["readinessProbe"]["exec"]["command"][:2] == ["test", "-f"]
    if age is not None:
        file = tmp_path / "round"
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    command = [word.replace("/tmp", str(tmp_path)) for word in beside["livenessProbe"]["exec"]["command"]]
    assert (subprocess.run(command, capture_output=True).returncode == 0) == lives


def test_gateway_service() -> None:
    offered = ("gateway.port=8080", "gateway.serviceType=LoadBalancer", "engine.apiKeySecret.name=keys")
    service = one(template(*offered), "Service", GATEWAY)["spec"]
    assert service["ports"][0]["port"] == 8080 and service["type"] == "LoadBalancer"


def test_gateway_rbac() -> None:
    (rule,) = one(template(), "Role")["rules"]
    assert rule == {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    assert one(template(), "RoleBinding")["subjects"][0]["name"] == GATEWAY


def test_gateway_pdb() -> None:
    assert one(template(), "PodDisruptionBudget", GATEWAY)["spec"]["maxUnavailable"] == 1


def test_networkpolicy() -> None:
    policy = one(template(), "NetworkPolicy", ENGINE)["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": 30000, "protocol": "TCP"}]
    peers = [peer["podSelector"]["matchLabels"].get("app.kubernetes.io/component") for peer in rule["from"]]
    assert peers == ["gateway", "test", None]
    assert rule["from"][2]["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "monitoring"
    }
    group = one(template(*LWS), "NetworkPolicy", ENGINE)["spec"]
    assert len(group["ingress"]) == len(group["egress"]) == 2, "nodes of one engine reach one another"
    download = one(template(), "NetworkPolicy", "lt-sglang-models")["spec"]
    assert "ingress" not in download and download["egress"][1] == {
        "ports": [{"port": 443, "protocol": "TCP"}]
    }
    assert "NetworkPolicy" not in kinds(template("networkPolicy.enabled=false"))


def test_networkpolicy_lets_clients_in_where_the_gateway_is_offered() -> None:
    """Who comes through a load balancer is in no namespace, so a namespace selector would keep him out."""

    def clients(*sets: str) -> list[dict] | None:
        rules = one(template("gateway.withoutKey=true", *sets), "NetworkPolicy", GATEWAY)["spec"]["ingress"]
        (rule,) = [rule for rule in rules if rule["ports"][0]["port"] == 8000]
        return rule.get("from")

    inside = clients()
    assert inside is not None and {"namespaceSelector": {}} in inside
    assert clients("gateway.serviceType=LoadBalancer") is None
    chosen = clients("gateway.serviceType=LoadBalancer", "gateway.allowFrom[0].ipBlock.cidr=10.0.0.0/8")
    assert chosen is not None and {"ipBlock": {"cidr": "10.0.0.0/8"}} in chosen
    assert {"namespaceSelector": {}} not in chosen


def test_podmonitor() -> None:
    engines, gateways = one(template(), "PodMonitor")["spec"]["podMetricsEndpoints"]
    (rename,) = engines["metricRelabelings"]
    assert (rename["regex"], rename["replacement"]) == ("sglang:(.+)", "sglang_$1")
    assert engines["relabelings"][0]["regex"] == "engine" and gateways["port"] == "metrics"


def monitoring(*sets: str) -> list[Object]:
    return objects(render([], sets, chart=MONITORING))


def test_objectives() -> None:
    """Of a release of its own; those of all are the chart lt-sglang-monitoring's."""
    assert "PrometheusRule" not in kinds(template())
    rule = one(template("monitoring.objectives.ttftSecondsPer1kTokens=1"), "PrometheusRule")
    assert rule["spec"]["groups"][0]["rules"] == [
        {
            "record": "lt:objective:ttft_seconds_per_1k_tokens",
            "expr": "vector(1)",
            "labels": {"namespace": "lt-sglang", "app_kubernetes_io_instance": "lt-sglang"},
        }
    ]


def test_prometheusrule() -> None:
    rules = one(monitoring("labels.release=prom"), "PrometheusRule")
    assert rules["metadata"]["labels"]["release"] == "prom"
    alerts = {
        rule["alert"] for group in rules["spec"]["groups"] for rule in group["rules"] if "alert" in rule
    }
    assert "LtSglangDown" in alerts
    assert "PrometheusRule" not in kinds(monitoring("rules=false"))


def test_dashboard() -> None:
    board = one(monitoring(), "ConfigMap")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["lt-sglang.json"])["uid"] == "lt-sglang"
    assert "ConfigMap" not in kinds(monitoring("dashboard=false"))


def test_scaledobject() -> None:
    assert "ScaledObject" not in kinds(template())
    found = template("autoscaling.enabled=true")
    scaled = one(found, "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": ENGINE}
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 600
    assert "num_queue_reqs" in scaled["triggers"][0]["metadata"]["query"]
    assert "replicas" not in one(found, "Deployment", ENGINE)["spec"], "Helm would undo the scaling"
    group = one(template(*LWS, "autoscaling.enabled=true"), "ScaledObject")["spec"]["scaleTargetRef"]
    assert group["kind"] == "LeaderWorkerSet"
