"""Every pod of the charts keeps PodSecurity's level `restricted`, whatever is switched on."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from .chart import VALUES, Object, one, template
from .pod_security import pods, violations
from .test_manifests import SWITCHES
from .test_ray_config import MANIFESTS


def wrong(found: list[Object]) -> list[str]:
    """What is refused of any pod of these objects."""
    inside = [pod for item in found for pod in pods(item)]
    assert inside
    return [fault for pod in inside for fault in violations(pod)]


@pytest.mark.parametrize("name", VALUES)
def test_values_files(name: str) -> None:
    assert wrong(template(values=name)) == []


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch(switch: str) -> None:
    own = "wait: "  # an init container of the user's, who says what it may do
    assert [fault for fault in wrong(template(switch)) if not fault.startswith(own)] == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_ray(name: str) -> None:
    """Head and workers."""
    assert len(list(pods(next(o for o in MANIFESTS[name] if o["kind"].startswith("Ray"))))) == 2
    assert wrong(MANIFESTS[name]) == []


WORSE: dict[str, tuple[Any, ...]] = {
    "hostNetwork": ("hostNetwork", True),
    "volume host: hostPath": ("volumes", [{"name": "host", "hostPath": {"path": "/"}}]),
    "pod: runAsUser 0": ("securityContext", "runAsUser", 0),
    "engine: runAsNonRoot": ("securityContext", "runAsNonRoot", False),
    "engine: seccompProfile": ("securityContext", "seccompProfile", "type", "Unconfined"),
    "pod: appArmorProfile": ("securityContext", "appArmorProfile", {"type": "Unconfined"}),
    "engine: privileged": ("containers", 0, "securityContext", "privileged", True),
    "engine: allowPrivilegeEscalation": (
        "containers",
        0,
        "securityContext",
        "allowPrivilegeEscalation",
        None,
    ),
    "engine: capabilities.drop": ("containers", 0, "securityContext", "capabilities", {}),
    "engine: capabilities.add": ("containers", 0, "securityContext", "capabilities", "add", ["SYS_ADMIN"]),
    "engine: hostPort": ("containers", 0, "ports", [{"hostPort": 80}]),
    "wait-for-model: allowPrivilegeEscalation": (
        *("initContainers", 0, "securityContext"),
        *("allowPrivilegeEscalation", True),
    ),
}


@pytest.mark.parametrize("fault", WORSE)
def test_the_check_itself(fault: str) -> None:
    """Each of these is noticed, and nothing else is said of the pod or that container."""
    engine = one(template(), "Deployment", "lt-sglang-engine")
    (pod,) = pods(copy.deepcopy(engine))
    assert violations(pod) == []
    *path, last, value = WORSE[fault]
    part: Any = pod
    for step in path:
        part = part[step]
    part[last] = value
    assert [found for found in violations(pod) if found[:4] == fault[:4]] == [fault]
