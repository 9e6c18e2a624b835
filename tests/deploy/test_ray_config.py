"""Ray without a cluster: settings, the application's shape, manifests and config files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.ray.settings import Settings, SettingsError

from .chart import faults

ROOT = Path(__file__).resolve().parents[2]
RAY = ROOT / "k8s" / "ray"
SERVE_CONFIG = yaml.safe_load((ROOT / "deploy" / "ray" / "serve-config.yaml").read_text(encoding="utf-8"))
MANIFESTS = [
    item
    for file in sorted(RAY.glob("*.yaml"))
    for item in yaml.safe_load_all(file.read_text(encoding="utf-8"))
]
SERVICE = next(item for item in MANIFESTS if item["kind"] == "RayService")


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


@pytest.mark.parametrize("item", MANIFESTS, ids=lambda item: item["kind"])
def test_manifests_are_valid(item: dict[str, Any]) -> None:
    assert faults(item, "1.37") == []
    assert faults({**item, "spec": {**item["spec"], "rayClusterConfg": {}}}, "1.37")


def test_service_runs_the_config_file() -> None:
    assert yaml.safe_load(SERVICE["spec"]["serveConfigV2"]) == SERVE_CONFIG
    cluster = next(item for item in MANIFESTS if item["kind"] == "RayCluster")
    assert SERVICE["spec"]["rayClusterConfig"] == cluster["spec"]


def test_config_files_are_rays() -> None:
    ray = pytest.importorskip("ray")
    from ray.serve.schema import ServeDeploySchema

    parsed = ServeDeploySchema.model_validate(SERVE_CONFIG)
    assert parsed.applications[0].import_path == "deploy.ray.app:build"
    schema = json.loads(
        (Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8")
    )
    cluster = yaml.safe_load((ROOT / "deploy" / "ray" / "cluster.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(cluster, schema)


def test_cluster_has_room_and_time() -> None:
    settings = Settings.from_dict(SERVE_CONFIG["applications"][0]["args"])
    (group,) = SERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    worker = pod["containers"][0]
    limits = worker["resources"]["limits"]
    assert settings.replicas[1] * settings.tp <= int(limits["nvidia.com/gpu"]) * group["maxReplicas"]
    assert settings.cpus * 8 / settings.tp <= int(limits["cpu"])
    assert pod["terminationGracePeriodSeconds"] >= settings.drain_seconds + 90
    ports = [port["containerPort"] for port in worker["ports"] if port["name"].startswith("engine-")]
    assert ports == [settings.port_base + gpu for gpu in range(0, 8, settings.tp)], "each engine is scraped"
    monitor = next(item for item in MANIFESTS if item["kind"] == "PodMonitor")
    scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert scraped == {port["name"] for port in worker["ports"]}
    for endpoint in monitor["spec"]["podMetricsEndpoints"][1:]:
        assert endpoint["relabelings"] == [{"targetLabel": "elastic", "replacement": "true"}]
    assert SERVICE["spec"]["upgradeStrategy"] == {"type": "None"}, "there are no GPUs for a second cluster"
