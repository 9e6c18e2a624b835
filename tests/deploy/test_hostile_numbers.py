"""As test_hostile_values.py, for what is no string: numbers, switches, maps, lists, and the keys of maps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .test_hostile_values import (
    HOSTILE,
    MADE,
    PLACES,
    SCHEMA,
    VALIDATOR,
    accepted,
    differences,
    everywhere,
    merged,
    resolved,
    shown,
)

Place = tuple[str | int, ...]
Documents = list[dict[str, Any]]
Values = Callable[[list[Place]], Any]

# What a template may write in another form than it got: as 1e+06, or rounded.
NUMBERS = (-1, 0, 7.25, 12345678, 2**53 + 1, 10**21, 1e-7)
PLAIN_NUMBERS = (8, 8000000, 0.25)


def leaves(schema: dict[str, Any], path: Place = ()) -> Iterator[tuple[Place, str]]:
    """Paths of all values with each kind that they may have; ``open`` is a map with keys of the user's."""
    schema = resolved(schema)
    kinds = schema.get("type", [option.get("type") for option in schema.get("anyOf", ())])
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        yield path, kind
        if kind == "object" and schema.get("additionalProperties") is not False:
            yield path, "open"
    for name, part in schema.get("properties", {}).items():
        yield from leaves(part, (*path, name))
    if isinstance(schema.get("items"), dict):
        yield from leaves(schema["items"], (*path, 0))


KINDS = [(path, kind) for path, kind in leaves(SCHEMA) if path and path != ("global",)]
NUMBERED = sorted({path for path, kind in KINDS if kind in ("integer", "number")}, key=str)
WHOLE = {path for path in NUMBERED if (path, "number") not in KINDS}
OPEN = sorted({path for path, kind in KINDS if kind == "open"}, key=str)


def put(place: Place, value: Any) -> Any:
    """Values with ``value`` at ``place``, and the names that items of lists need."""
    for step in reversed(place):
        if step == 0:
            value = [{"name": "other", **value} if isinstance(value, dict) else value]
        else:
            value = {step: value}
    return value


def together(values: Iterable[tuple[Place, Any]]) -> Any:
    """The values of everywhere(), and each of these at its place."""
    found: Any = everywhere({})
    for place, value in values:
        found = merged(found, put(place, value))
    return found


def grouped(
    places: list[Place], hostile: Values, plain: Values, folder: Path
) -> Iterator[tuple[list[Place], Documents, Documents]]:
    """Places with the documents of both values at all of them; halves, where a check refuses one."""
    groups = [places] if places else []
    while groups:
        some = groups.pop()
        found, other = (shown(values(some), folder) for values in (hostile, plain))
        if found is not None and other is not None:
            yield some, found, other
        elif len(some) > 1:
            groups += [some[: len(some) // 2], some[len(some) // 2 :]]


def test_the_schema_has_all_kinds() -> None:
    assert len(WHOLE) > 30 and len(NUMBERED) > len(WHOLE) + 5 and len(OPEN) > 25
    assert ("engine", "replicas") in WHOLE and ("engine", "gpu", "memoryFraction") in NUMBERED
    wanted = {("engine", "podSecurityContext"), ("engine", "labels"), ("engine", "probes", "liveness")}
    assert wanted | {("engine", "extraVolumes", 0), ("networkPolicy", "engineEgress", 0)} <= set(OPEN)


def test_text_is_no_number_no_switch_no_map_and_no_list() -> None:
    """The schema refuses each hostile string wherever it asks for another kind."""
    others = {path for path, kind in KINDS if kind not in ("string", "null")} - set(PLACES)
    assert len(others) > 100
    wrong = [
        (path, text) for path in others for text in HOSTILE if VALIDATOR.is_valid(together([(path, text)]))
    ]
    assert wrong == []


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_a_number_arrives_as_a_number(number: float, tmp_path: Path) -> None:
    """Refused; or the documents differ from those of a plain number in numbers alone, none as 1e+06."""

    def plain(path: Place) -> float | None:
        wanted = [one for one in PLAIN_NUMBERS if (one > 2**20) == (number > 2**20)]
        return next((one for one in wanted if accepted(path, one)), None)

    places = [path for path in NUMBERED if accepted(path, number) and plain(path) is not None]
    rendered = 0
    for some, found, other in grouped(
        places,
        lambda some: together((path, number) for path in some),
        lambda some: together((path, plain(path)) for path in some),
        tmp_path,
    ):
        rendered += len(some)
        for where, mine, theirs in differences(found, other):
            if isinstance(mine, str) and re.search(MADE, mine):
                continue
            assert bare(mine) == bare(theirs), (some, where, mine, theirs)
            if isinstance(number, int) and not where.endswith(".expr"):  # PromQL takes either form
                assert not re.search(r"[0-9][eE][+-]?[0-9]", str(mine)), (where, mine)
    assert rendered or number in (-1, 10**21)


def bare(leaf: object) -> object:
    """A leaf whose numbers are all the same."""
    if isinstance(leaf, str):
        return re.sub(r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", "N", leaf)
    return type(leaf)


@pytest.mark.parametrize("key", HOSTILE, ids=json.dumps)
def test_a_hostile_key_is_refused_or_a_plain_key(key: str, tmp_path: Path) -> None:
    """In each map whose keys are the user's: the documents are the same, but for that key."""

    def keyed(name: str) -> Values:
        return lambda some: together((path, {name: word(path)}) for path in some)

    places = [path for path in OPEN if VALIDATOR.is_valid(keyed(key)([path]))]
    rendered: set[Place] = set()
    for some, found, plain in grouped(places, keyed(key), keyed("example.com/plain"), tmp_path):
        assert renamed(found, key) == renamed(plain, key), some
        rendered.update(some)
    assert ("engine", "podSecurityContext") in rendered


def test_a_key_that_merges_maps_is_refused(tmp_path: Path) -> None:
    """Wherever it stands; as a value it is text to Kubernetes, and to PyYAML nothing at all."""
    for place in (
        ("engine", "securityContext"),
        ("networkPolicy", "engineEgress", 0),
        ("engine", "affinity"),
    ):
        values = together([(place, {"inner": {"<<": {"privileged": True}}})])
        assert VALIDATOR.is_valid(values) and shown(values, tmp_path) is None


def word(path: Place) -> object:
    """A value for a key of the map at ``path``."""
    return 1 if path[-1] == "extraResources" else "x"


def renamed(document: Any, key: str) -> Any:
    """``document`` with ``key``, and the plain one, called the same; and no names that are made of a pod."""
    if isinstance(document, dict):
        return {renamed(name, key): renamed(part, key) for name, part in document.items()}
    if isinstance(document, list):
        return [renamed(part, key) for part in document]
    if document in (key, "example.com/plain"):
        return "the key"
    return re.sub(MADE, "", document) if isinstance(document, str) else document
