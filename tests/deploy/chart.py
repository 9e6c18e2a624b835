"""Rendered objects of the chart, and their validation."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from k8s.render import CHART, MONITORING, committed, render

# Published CustomResourceDefinitions, one file each: data beside the clone, not part of it.
CRDS = Path(os.environ.get("LT_CRDS") or Path(__file__).resolve().parents[3] / "shared" / "crds")
CUSTOM = {
    ("gateway.networking.k8s.io/v1", "HTTPRoute"),
    ("inference.networking.k8s.io/v1", "InferencePool"),
    ("keda.sh/v1alpha1", "ScaledObject"),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"),
    ("monitoring.coreos.com/v1", "PodMonitor"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("ray.io/v1", "RayCluster"),
    ("ray.io/v1", "RayService"),
}
KUBERNETES = [f"1.{minor}" for minor in range(29, 38)]
VALUES = {values.stem: values for values, _ in committed()}
MINIMAL = ("model.name=me/model",)

Object = dict[str, Any]


def objects(text: str) -> list[Object]:
    """The objects of a manifest."""
    return [item for item in yaml.safe_load_all(text) if item]


@cache
def _rendered(values: tuple[str, ...], sets: tuple[str, ...]) -> str:
    return render([VALUES[name] for name in values], sets)


def template(*sets: str, values: str | None = None) -> list[Object]:
    """The objects of the chart with one of its values files (or the smallest values) and ``sets``."""
    if values is None:
        return objects(_rendered((), (*MINIMAL, *sets)))
    return objects(_rendered((values,), sets))


def builtin(found: Iterable[Object]) -> list[Object]:
    """Those of Kubernetes' own kinds."""
    return [item for item in found if (item["apiVersion"], item["kind"]) not in CUSTOM]


def custom(found: Iterable[Object]) -> list[Object]:
    """Those whose kinds others define."""
    return [item for item in found if (item["apiVersion"], item["kind"]) in CUSTOM]


def one(found: Iterable[Object], kind: str, name: str | None = None) -> Object:
    """The only object of ``kind``."""
    (match,) = [o for o in found if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    return match


def kinds(found: Iterable[Object]) -> list[str]:
    """Kinds, sorted, with repetitions."""
    return sorted(item["kind"] for item in found)


def container(workload: Object) -> Object:
    """The first container of a workload's pods."""
    spec = workload["spec"]["template"]["spec"]
    return dict(spec["containers"][0])


def flags(workload_container: Object) -> dict[str, str]:
    """``--flag=value`` arguments."""
    pairs = (arg.partition("=") for arg in workload_container["args"] if arg.startswith("--"))
    return {flag: value for flag, _, value in pairs}


def engine_flags(found: Iterable[Object]) -> dict[str, str]:
    """``--flag=value`` arguments of the engines."""
    (engines,) = [o for o in found if o["kind"] == "Deployment" and o["metadata"]["name"].endswith("-engine")]
    return flags(container(engines))


def faults(item: Object, version: str) -> list[str]:
    """What is wrong with an object: Kubernetes' strict schema, or its CustomResourceDefinition's.

    Skips the test at a custom resource if there are no CustomResourceDefinitions here.
    """
    key = (item["apiVersion"], item["kind"])
    if key in CUSTOM:
        if not CRDS.is_dir():
            pytest.skip(f"no CustomResourceDefinitions in {CRDS}; set LT_CRDS to a folder that has them")
        crd = _crd_schemas()[key]
        errors = jsonschema.Draft202012Validator(crd).iter_errors(item)
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
    try:
        kubernetes_validate.validate(item, version, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [str(error)]
    return []


@cache
def _crd_schemas() -> Mapping[tuple[str, str], Object]:
    schemas = {}
    for file in sorted(CRDS.glob("*.yaml")):
        with file.open(encoding="utf-8") as text:
            definitions = [item for item in yaml.load_all(text, yaml.CSafeLoader) if item]
        for spec in (definition["spec"] for definition in definitions):
            for version in spec["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                schema["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
                schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    assert schemas.keys() >= CUSTOM
    return schemas


def _strict(schema: Any) -> Any:
    """The schema with every unknown key an error, as the API server's strict validation does."""
    if not isinstance(schema, dict):
        return schema
    schema = copy.copy(schema)
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in schema:
        schema["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        schema["items"] = _strict(schema["items"])
    return schema


__all__ = [
    "CHART",
    "KUBERNETES",
    "MINIMAL",
    "MONITORING",
    "VALUES",
    "container",
    "engine_flags",
    "faults",
    "flags",
    "kinds",
    "objects",
    "one",
    "template",
]
