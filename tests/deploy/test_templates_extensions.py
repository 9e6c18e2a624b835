"""As test_templates.py: what a user adds to the pods, and where it arrives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .chart import Object, container, flags, one, template
from .test_docker import DOCKERFILE
from .test_templates import ENGINE, GATEWAY, engine, pod, pod_labels

CA = (
    *("extraVolumes[0].name=ca", "extraVolumes[0].configMap.name=ca"),
    *("extraVolumeMounts[0].name=ca", "extraVolumeMounts[0].mountPath=/etc/ca"),
)
PROXY = ("extraEnv[0].name=HTTPS_PROXY", "extraEnv[0].value=http://proxy:3128")


def below(key: str, *sets: str) -> list[str]:
    return [f"{key}.{each}" for each in sets]


def has_ca(spec: dict[str, Any]) -> bool:
    mounted = {"name": "ca", "mountPath": "/etc/ca"} in spec["containers"][0]["volumeMounts"]
    return mounted and {"name": "ca", "configMap": {"name": "ca"}} in spec["volumes"]


def test_an_engines_pod_takes_what_is_added() -> None:
    found = engine(
        *below("engine", *CA, *PROXY, "labels.team=a", "podLabels.tier=b", "podAnnotations.c=d"),
        *below("engine", "extraInitContainers[0].name=first", "extraInitContainers[0].image=busybox"),
        *below("engine", "podSecurityContext.fsGroup=7", "securityContext.runAsUser=7"),
        *below("engine", "probes.liveness.failureThreshold=9", "maxSurge=25%", "maxUnavailable=0"),
    )
    spec = pod(found)
    assert has_ca(spec) and {"name": "HTTPS_PROXY", "value": "http://proxy:3128"} in container(found)["env"]
    assert [each["name"] for each in spec["initContainers"]] == ["wait-for-model", "first"]
    assert found["metadata"]["labels"]["team"] == "a" and pod_labels(found)["tier"] == "b"
    assert found["spec"]["template"]["metadata"]["annotations"] == {"c": "d"}
    assert spec["securityContext"]["fsGroup"] == 7 and spec["securityContext"]["runAsNonRoot"] is True
    security = container(found)["securityContext"]
    assert security["runAsUser"] == 7 and security["capabilities"] == {"drop": ["ALL"]}
    live = container(found)["livenessProbe"]
    assert live["failureThreshold"] == 9 and live["httpGet"]["path"] == "/health_generate"
    assert found["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": "25%", "maxUnavailable": 0}


def test_a_gateways_pod_and_service_take_what_is_added() -> None:
    given = ("serviceAnnotations.a=b", "labels.c=d", "podLabels.e=f", "podAnnotations.g=h")
    found = template(*below("gateway", *given, *PROXY, "extraArgs={--log-level=debug}"))
    gateway = one(found, "Deployment", GATEWAY)
    assert one(found, "Service", GATEWAY)["metadata"]["annotations"] == {"a": "b"}
    assert gateway["metadata"]["labels"]["c"] == "d" and pod_labels(gateway)["e"] == "f"
    assert gateway["spec"]["template"]["metadata"]["annotations"] == {"g": "h"}
    assert flags(container(gateway))["--log-level"] == "debug"
    assert {"name": "HTTPS_PROXY", "value": "http://proxy:3128"} in container(gateway)["env"]


def test_a_download_takes_a_proxy_a_ca_and_tainted_nodes() -> None:
    found = template(
        *below("modelCache", *CA, *PROXY, "tolerations[0].operator=Exists", "nodeSelector.disk=ssd")
    )
    job = one(found, "Job")
    assert has_ca(pod(job)) and pod(job)["tolerations"] == [{"operator": "Exists"}]
    assert pod(job)["nodeSelector"] == {"disk": "ssd"}
    assert {"name": "HTTPS_PROXY", "value": "http://proxy:3128"} in container(job)["env"]


@pytest.mark.parametrize(
    ("value", "policy"),
    [("engineEgress", ENGINE), ("gatewayEgress", GATEWAY), ("downloadEgress", "lt-sglang-models")],
)
def test_each_network_policy_takes_rules(value: str, policy: str) -> None:
    def egress(*sets: str) -> list[Object]:
        rules: list[Object] = one(template(*sets), "NetworkPolicy", policy)["spec"]["egress"]
        return rules

    assert egress(f"networkPolicy.{value}[0].ports[0].port=4317") == [*egress(), {"ports": [{"port": 4317}]}]


def test_a_models_own_code_is_copied_beside_its_volume(tmp_path: Path) -> None:
    """--trust-remote-code copies it before it is imported, and the volume is read-only."""
    model = tmp_path / "models" / "mine"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    (model / "code.py").write_text(
        "import transformers\nclass Config(transformers.PretrainedConfig):\n    model_type = 'mine'\n"
    )
    (hub,) = re.findall(r"HF_HOME=(\S+)", DOCKERFILE)
    assert hub.startswith("/models/"), "the image's own, on the volume"
    given = {each["name"]: each["value"] for each in container(engine())["env"]}
    assert given["HOME"].startswith("/scratch") and given["HF_MODULES_CACHE"].startswith("/scratch/")
    places = {name: f"{tmp_path}{given[name]}" for name in ("HOME", "HF_MODULES_CACHE")}
    before = sorted((tmp_path / "models").rglob("*"))
    code = "import sys, transformers as t; t.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    env = {**os.environ, **places, "HF_HOME": f"{tmp_path}{hub}", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(model)], env=env, check=True, timeout=120)
    assert sorted((tmp_path / "models").rglob("*")) == before
    assert list(Path(places["HF_MODULES_CACHE"]).rglob("code.py"))
