"""Kubernetes' PodSecurity level `restricted`, as its Pod Security Standards list it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Pod = dict[str, Any]

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"} | {
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SECCOMP = ("RuntimeDefault", "Localhost")
PROFILES = ("RuntimeDefault", "Localhost", None)
SYSCTLS = {"kernel.shm_rmid_forced", "net.ipv4.ip_unprivileged_port_start"}
SELINUX = {"container_t", "container_init_t", "container_kvm_t", "container_engine_t", "", None}


def pods(item: dict[str, Any]) -> Iterator[Pod]:
    """The specifications of an object's pods, wherever its kind has them."""
    if item["kind"] == "Pod":
        yield item["spec"]
        return
    inside: list[Any] = [item.get("spec")]
    while inside:
        part = inside.pop()
        if isinstance(part, dict):
            if isinstance(part.get("containers"), list):
                yield part
            else:
                inside += part.values()
        elif isinstance(part, list):
            inside += part


def violations(pod: Pod) -> list[str]:
    """What of a pod the level `restricted` refuses."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    for volume in pod.get("volumes", ()):
        found += [f"volume {volume['name']}: {kind}" for kind in volume.keys() - VOLUMES - {"name"}]
    whole = pod.get("securityContext", {})
    found += [f"sysctl {each['name']}" for each in whole.get("sysctls", ()) if each["name"] not in SYSCTLS]
    found += list(_shared("pod", whole))
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        for each in pod.get(kind, ()):
            found += list(_container(each, whole))
    return found


def _shared(name: str, context: dict[str, Any]) -> Iterator[str]:
    """What both a pod and a container may say."""
    if context.get("runAsUser") == 0:
        yield f"{name}: runAsUser 0"
    if context.get("seLinuxOptions", {}).get("type") not in SELINUX:
        yield f"{name}: seLinuxOptions"
    if context.get("appArmorProfile", {}).get("type") not in PROFILES:
        yield f"{name}: appArmorProfile"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield f"{name}: hostProcess"


def _container(container: dict[str, Any], whole: dict[str, Any]) -> Iterator[str]:
    name, context = container["name"], container.get("securityContext", {})
    yield from _shared(name, context)
    capabilities = context.get("capabilities", {})
    wrong = {
        "privileged": context.get("privileged"),
        "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is not False,
        "capabilities.drop": "ALL" not in capabilities.get("drop", ()),
        "capabilities.add": set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"},
        "runAsNonRoot": not context.get("runAsNonRoot", whole.get("runAsNonRoot")),
        "seccompProfile": (context.get("seccompProfile") or whole.get("seccompProfile", {})).get("type")
        not in SECCOMP,
        "procMount": context.get("procMount", "Default") != "Default",
        "hostPort": any(port.get("hostPort") for port in container.get("ports", ())),
    }
    yield from (f"{name}: {what}" for what, is_wrong in wrong.items() if is_wrong)
