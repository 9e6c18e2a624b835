"""Hostile strings in every place of the schema that takes one: refused, or nothing but that string."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from k8s.render import render
from lt_sglang.errors import LightTransferError

from .chart import CHART, objects

HOSTILE = json.loads((Path(__file__).parent / "hostile_values.json").read_text(encoding="utf-8"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
# What has to be set beside a value, so that it lands in the manifest at all.
BESIDE: dict[str, Any] = {
    "model": {"name": "me/model", "tokenSecret": {"name": "hub"}},
    "engine": {"apiKeySecret": {"name": "keys"}, "gpu": {"memoryGiB": 80}},
    "adminKeySecret": {"name": "operators"},
    "autoscaling": {"enabled": True},
    "compileCache": {"size": "1Gi"},
    "httpRoute": {
        "enabled": True,
        "parentRefs": [{"name": "public"}],
        "canary": {"release": "b", "weight": 1},
    },
    "inferencePool": {"enabled": True},
    "job": {"command": "eval"},
}
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
# Harmless words; a quantity or an address takes none of the first kind.
PLAIN = ("plain0", "7", "1.2.3.4/5")
MADE = r"-(models|eval)-[0-9a-f]{8}"  # a Job's name is made of its pod
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """What a reference in the schema leads to."""
    return SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def places(schema: dict[str, Any], path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all strings without a closed list of values: a list's first item, a map's ``key``."""
    schema = resolved(schema)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if "string" in kinds or any(one.get("type") == "string" for one in schema.get("anyOf", ())):
        yield path
    for name, part in schema.get("properties", {}).items():
        yield from places(part, (*path, name))
    if isinstance(schema.get("items"), dict):
        yield from places(schema["items"], (*path, 0))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from places(schema["additionalProperties"], (*path, "key"))


PLACES = sorted(set(places(SCHEMA)), key=str)


def at(path: tuple[str | int, ...], value: object) -> Any:
    """Values with ``value`` at ``path``, and nothing else but the name that a variable needs."""
    part: Any = {"name": "OTHER", path[-1]: value} if "extraEnv" in path else {path[-1]: value}
    if path[-1] == 0:
        part = [value]
    for step in reversed(path[:-1]):
        part = [part] if step == 0 else {step: part}
    return part


def everywhere(words: Mapping[tuple[str | int, ...], object]) -> dict[str, Any]:
    """The chart's own values, those of BESIDE, and each word at its path."""
    values: Any = merged(DEFAULTS, BESIDE)
    for path, word in words.items():
        values = merged(values, at(path, word))
    return values  # type: ignore[no-any-return]


def plain_for(path: tuple[str | int, ...]) -> str | None:
    """A harmless word that the schema takes at ``path``."""
    return next((word for word in PLAIN if accepted(path, word)), None)


def accepted(path: tuple[str | int, ...], value: object) -> bool:
    """Whether the schema takes ``value`` at ``path``; Helm checks the same file."""
    return VALIDATOR.is_valid(everywhere({path: value}))


def merged(one: Any, other: Any) -> Any:
    """Both, the second's strings over the first's."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: merged(one.get(key), other.get(key)) for key in {**one, **other}}
    if isinstance(one, list) and isinstance(other, list):
        return [merged(*pair) for pair in zip_longest(one, other)]
    return one if other is None else other


def shown(values: dict[str, Any], folder: Path) -> list[dict[str, Any]] | None:
    """The objects rendered; None if a check refuses the values."""
    file = folder / "values.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    try:
        return objects(render([file]))
    except LightTransferError as error:
        text = str(error)
        # Refused means by the schema or by a check, not by a document that is broken.
        assert "YAML parse error" not in text and "error converting YAML" not in text, text
        return None


def differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two documents differ, leaf by leaf; a key or an item more is a difference too."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{path}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from differences(mine, theirs, f"{path}[{number}]")
    elif one != other or type(one) is not type(other):
        yield path, one, other


def test_the_schema_has_places() -> None:
    assert len(PLACES) > 60 and {path for path in PLACES if plain_for(path) is None} == {
        ("autoscaling", "prometheusUrl"),
        ("engine", "maxSurge"),
        ("engine", "maxUnavailable"),
        ("gateway", "image", "digest"),
        ("httpRoute", "pathPrefix"),
        ("image", "digest"),
        ("model", "path"),
        ("model", "url"),
        ("monitoring", "interval"),
        ("tracing", "endpoint"),
    }, "what takes a closed form, which no hostile value has"
    assert ("model", "servedName") in PLACES and ("engine", "podLabels", "key") in PLACES


@pytest.mark.parametrize("value", HOSTILE, ids=json.dumps)
def test_a_hostile_value_is_refused_or_a_plain_string(value: str, tmp_path: Path) -> None:
    """Compared with a harmless word in the same places: where they differ, both are strings of the two."""
    groups = [[path for path in PLACES if accepted(path, value)]]
    rendered: set[tuple[str | int, ...]] = set()
    while groups:
        paths = groups.pop()
        found = shown(everywhere(dict.fromkeys(paths, value)), tmp_path)
        if found is None:
            # A check refuses one of them: halve until it is alone.
            middle = len(paths) // 2
            groups += [paths[:middle], paths[middle:]] if len(paths) > 1 else []
            continue
        rendered.update(paths)
        words = {path: plain_for(path) for path in paths}
        plain = shown(everywhere({path: word for path, word in words.items() if word}), tmp_path)
        assert plain is not None and all(words.values()), [path for path in paths if not words[path]]
        for where, mine, theirs in differences(found, plain):
            assert isinstance(mine, str) and isinstance(theirs, str), (where, mine, theirs)
            if re.search(MADE, mine):
                continue
            assert any(mine.replace(value, word) == theirs for word in PLAIN), (where, mine, theirs)
    assert ("model", "servedName") in rendered, "a name that clients may use as they like"
