"""Read verdicts.toml, and say what it lacks.

python -m tests.contract.verdicts        prints what lacks a verdict, and verdicts for what is gone
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(__file__).with_name("verdicts.toml")
KINDS = ("works", "refused", "no_concern")


@dataclass(frozen=True)
class Group:
    """One group of verdicts.toml.

    section: what its entries name. kind: of KINDS. says: the test, or the reason. entries: names and
    patterns. where: for an error message.
    """

    section: str
    kind: str
    says: str
    entries: tuple[str, ...]
    where: str


def load(text: str | None = None) -> list[Group]:
    """The groups in their order. Raises ValueError for one that is not of the form the file describes."""
    found = []
    for section, groups in tomllib.loads(DATA.read_text(encoding="utf-8") if text is None else text).items():
        for number, group in enumerate(groups, 1):
            where = f"{section}, group {number}"
            given = [kind for kind in KINDS if kind in group]
            if len(given) != 1 or set(group) - {*KINDS, "names", "why"} or not group.get("names", "").split():
                raise ValueError(f"{where}: wants names and exactly one of {', '.join(KINDS)}")
            (kind,) = given
            found.append(Group(section, kind, group[kind], tuple(group["names"].split()), where))
    return found


def assign(section: str, names: Iterable[str], groups: Iterable[Group]) -> tuple[dict[str, Group], list[str]]:
    """The verdict of every name that has one, and sentences on entries that are wrong.

    The narrowest entry counts: a name in full before a pattern of the same beginning, that before the rest.
    """
    names = set(names)
    ranked: dict[str, tuple[int, Group]] = {}
    wrong = []
    for group in groups:
        if group.section != section:
            continue
        for entry in group.entries:
            matched = [name for name in names if _matches(section, entry, name)]
            if not matched:
                wrong.append(f"{group.where}: {entry} names nothing that SGLang has")
            for name in matched:
                rank = _rank(entry, name)
                known = ranked.get(name)
                if known is not None and known[0] == rank and known[1] is not group:
                    wrong.append(f"{group.where}: {name} has a verdict in {known[1].where} as well")
                if known is None or rank > known[0]:
                    ranked[name] = rank, group
    return {name: group for name, (_, group) in ranked.items()}, wrong


def problems(surface: Mapping[str, set[str]], groups: Iterable[Group]) -> list[str]:
    """Sentences: what lacks a verdict, what has one in vain or two, and tests that do not exist."""
    groups = list(groups)
    found = [f"{g.where}: there is no section {g.section}" for g in groups if g.section not in surface]
    for section, names in surface.items():
        given, wrong = assign(section, names, groups)
        found += [f"{section}: no verdict for {name}" for name in sorted(names - given.keys())] + wrong
    for group in groups:
        if group.kind != "no_concern":
            found += [
                f"{group.where}: there is no test {test}" for test in group.says.split() if not exists(test)
            ]
    return found


def exists(test: str) -> bool:
    """Whether ``tests/folder/test_file.py::test_name`` is there, a parameter in brackets aside."""
    file, _, name = test.partition("::")
    path = REPOSITORY / file
    return path.is_file() and name.partition("[")[0] in _tests_of(path)


@cache
def _tests_of(path: Path) -> frozenset[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return frozenset(n.name for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def _matches(section: str, entry: str, name: str) -> bool:
    # "rid" is the field of every model.
    if section == "requests" and "." not in entry:
        entry = f"*.{entry}"
    return fnmatchcase(name, entry)


def _rank(entry: str, name: str) -> int:
    if entry == name:
        return len(name) + 1
    return entry.find("*") if "*" in entry else 0


if __name__ == "__main__":
    from tests.contract.surface import surface

    lines = problems(surface(), load())
    print("\n".join(lines) or "everything has a verdict")
    sys.exit(bool(lines))
