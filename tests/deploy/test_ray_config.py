"""Ray without a cluster: settings, the application's shape, manifests and config files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.ray.settings import Settings, SettingsError
from k8s import render
from lt_sglang.errors import LightTransferError

from .chart import faults, objects, one

ROOT = Path(__file__).resolve().parents[2]
SERVE_CONFIGS = {
    file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))
    for file in sorted(render.SERVE_CONFIGS.glob("*.yaml"))
}
MANIFESTS = {
    file.stem: [item for item in yaml.safe_load_all(file.read_text(encoding="utf-8")) if item]
    for file in sorted(render.RAY_MANIFESTS.glob("*.yaml"))
}
PRESETS = {"llama-3-70b-tp4", "llama-3-70b-tp8", "qwq-32b-tp2", "qwq-32b-tp4"}


def service(name: str) -> dict[str, Any]:
    return dict(one(MANIFESTS[name], "RayService")["spec"])


def ray_chart(*sets: str) -> list[dict[str, Any]]:
    """The Ray chart with a preset and ``sets``."""
    values = render.RAY / "values" / "qwq-32b-tp2.yaml"
    return objects(render.render([values], sets, chart=render.RAY))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"modle": "x"}, "modle: unknown setting"),
        ({"tp": 8, "nodes": 3}, "8 GPUs cannot lie on 3 nodes"),
        ({"replicas": [3, 2]}, "replicas"),
        ({"replicas": 0}, "replicas"),
        ({"args": ["--port=1"]}, "--port=1"),
        ({"args": ["--use-ray"]}, "load no plug-in"),
    ],
)
def test_bad_settings_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_dict(data)


def test_gpus_are_reserved_together() -> None:
    one = Settings.from_dict({"model": "m", "tp": 4, "cpus": 12})
    assert one.bundles == [{"CPU": 12, "GPU": 4}] and one.strategy == "STRICT_PACK"
    two = Settings.from_dict({"model": "m", "tp": 16, "nodes": 2, "cpus": 48})
    assert two.bundles == [{"CPU": 48, "GPU": 8}] * 2 and two.strategy == "STRICT_SPREAD"
    assert Settings.from_dict({"gpu": False}).bundles == [{"CPU": 8}]
    assert Settings.from_dict({"replicas": 3}).replicas == (3, 3)


def test_application() -> None:
    pytest.importorskip("ray")
    from deploy.ray.app import build

    app = build({"model": "m", "tp": 4, "drain_seconds": 900, "replicas": [1, 3], "requests_per_replica": 20})
    front = app._bound_deployment
    (engines,) = front.init_args
    engine = engines._bound_deployment
    options = engine._deployment_config
    assert engine._replica_config.placement_group_bundles == [{"CPU": 8.0, "GPU": 4.0}]
    assert engine._replica_config.placement_group_strategy == "STRICT_PACK"
    assert engine._replica_config.ray_actor_options["num_gpus"] == 4
    scaling = options.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 20)
    assert scaling.downscale_delay_s >= 600
    assert options.graceful_shutdown_timeout_s > 900 and options.health_check_timeout_s > 25
    assert front._deployment_config.graceful_shutdown_timeout_s > 900


def test_there_is_a_preset_for_each_model_and_size() -> None:
    assert set(SERVE_CONFIGS) == PRESETS and set(MANIFESTS) == PRESETS | {"cluster"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_valid(name: str) -> None:
    assert [fault for v in ("1.29", "1.37") for item in MANIFESTS[name] for fault in faults(item, v)] == []
    cluster = next(item for item in MANIFESTS[name] if item["apiVersion"] == "ray.io/v1")
    assert faults({**cluster, "spec": {**cluster["spec"], "rayClusterConfg": {}}}, "1.37")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_service_runs_the_config_file(name: str) -> None:
    assert yaml.safe_load(service(name)["serveConfigV2"]) == SERVE_CONFIGS[name]
    cluster = one(MANIFESTS["cluster"], "RayCluster")["spec"]
    if name == "qwq-32b-tp2":
        assert service(name)["rayClusterConfig"] == cluster


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_config_files_are_rays(name: str) -> None:
    pytest.importorskip("ray")
    from ray.serve.schema import ServeDeploySchema

    parsed = ServeDeploySchema.model_validate(SERVE_CONFIGS[name])
    assert parsed.applications[0].import_path == "deploy.ray.app:build"


def test_cluster_launcher_file_is_rays() -> None:
    ray = pytest.importorskip("ray")
    schema = json.loads(
        (Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8")
    )
    cluster = yaml.safe_load((ROOT / "deploy" / "ray" / "cluster.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(cluster, schema)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_cluster_has_room_and_time(name: str) -> None:
    settings = Settings.from_dict(SERVE_CONFIGS[name]["applications"][0]["args"])
    (group,) = service(name)["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    worker = pod["containers"][0]
    limits = worker["resources"]["limits"]
    assert settings.replicas[1] * settings.tp <= int(limits["nvidia.com/gpu"]) * group["maxReplicas"]
    assert settings.cpus * 8 / settings.tp <= int(limits["cpu"])
    assert pod["terminationGracePeriodSeconds"] >= settings.drain_seconds + 90
    hook = worker["lifecycle"]["preStop"]["exec"]["command"]
    assert hook == ["python3", "-m", "deploy.ray.drain", str(int(settings.drain_seconds))]
    ports = [port["containerPort"] for port in worker["ports"] if port["name"].startswith("engine-")]
    assert ports == [settings.port_base + gpu for gpu in range(0, 8, settings.tp)], "each engine is scraped"
    monitor = one(MANIFESTS[name], "PodMonitor")
    scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert scraped == {port["name"] for port in worker["ports"]}
    for endpoint in monitor["spec"]["podMetricsEndpoints"][1:]:
        assert endpoint["relabelings"] == [{"targetLabel": "elastic", "replacement": "true"}]
    assert service(name)["upgradeStrategy"] == {"type": "None"}, "there are no GPUs for a second cluster"


def test_the_cluster_is_guarded() -> None:
    """A token for the dashboard, a budget for disruptions, and ports for those alone who need them."""
    found = ray_chart()
    assert one(found, "RayService")["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    budgets = {o["metadata"]["name"]: o["spec"] for o in found if o["kind"] == "PodDisruptionBudget"}
    assert budgets["lt-sglang-engine"]["maxUnavailable"] == 1
    assert budgets["lt-sglang-head"]["maxUnavailable"] == 0, "the cluster ends with its head"
    worker = one(found, "NetworkPolicy", "lt-sglang-engine")["spec"]
    open_to_all = [rule for rule in worker["ingress"] if {"namespaceSelector": {}} in rule["from"]]
    assert [port["port"] for rule in open_to_all for port in rule["ports"]] == [8000]
    cluster = one(ray_chart("auth=false", "networkPolicy.enabled=false"), "RayService")["spec"]
    assert "authOptions" not in cluster["rayClusterConfig"]


def test_the_head_may_be_replaced_where_a_redis_keeps_its_state() -> None:
    found = ray_chart("redis.address=redis.db:6379", "redis.secret=redis")
    options = one(found, "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    secret = {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    assert options == {"redisAddress": "redis.db:6379", "redisPassword": secret}
    assert one(found, "PodDisruptionBudget", "lt-sglang-head")["spec"]["maxUnavailable"] == 1
    head = one(found, "NetworkPolicy", "lt-sglang-ray-head")["spec"]
    assert {"ports": [{"port": 6379, "protocol": "TCP"}]} in head["egress"]
    assert [fault for item in found for fault in faults(item, "1.37")] == []


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("application.model=",), "application.model: required"),
        (("application.tensorParallel=3",), "3 does not divide the 8 GPUs"),
        (("application.maxReplicas=9",), "9 engines of 2 GPUs do not fit on node.max: 2 nodes"),
        (("application.minReplicas=5",), "application.maxReplicas: less than minReplicas"),
        (("application.cpus=20",), "reserve more than node.cpu"),
        (("application.args={--tp-size=4}",), "--tp-size=4 is not for these"),
    ],
)
def test_what_cannot_work_is_refused(sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(LightTransferError, match=message):
        ray_chart(*sets)
