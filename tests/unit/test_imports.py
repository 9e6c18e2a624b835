"""Imports have no circles, those in functions and under TYPE_CHECKING included.

The order of folders is import-linter's affair (pyproject.toml, ``make lint``). It compares siblings; a
package's ``__init__.py`` and the files below it are compared here as well.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest


def imports(*packages: str) -> dict[str, set[str]]:
    graph = grimp.build_graph(*packages, cache_dir=None)
    found = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    return {name: others - {name} for name, others in found.items()}


def check(graph: dict[str, set[str]]) -> None:
    """Raises CycleError, which names the files of a circle."""
    TopologicalSorter(graph).prepare()


def test_no_file_imports_itself_through_others() -> None:
    check(imports("lt_sglang", "deploy", "k8s"))


def test_a_circle_of_late_imports_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "circled"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "one.py").write_text("def f():\n    from circled import two\n", encoding="utf-8")
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from circled.one import f\n"
    (folder / "two.py").write_text(late, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CycleError) as caught:
        check(imports("circled"))
    assert set(caught.value.args[1]) == {"circled.one", "circled.two"}
