"""One version of SGLang, in every place that names it."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from lt_sglang import __version__, doctor
from lt_sglang.upstream.recorded import SGLANG_VERSION

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    split = (text.split("==") for text in PROJECT["dependencies"] if "==" in text)
    return {name.strip(): version.strip() for name, version in split}


def test_the_package_pins_the_release_that_was_recorded() -> None:
    assert pins()["sglang"] == SGLANG_VERSION
    assert metadata.version("sglang") == SGLANG_VERSION


@pytest.mark.parametrize("name", ["torch", "flashinfer-python"])
def test_the_package_pins_what_sglang_pins(name: str) -> None:
    assert pins()[name] == doctor.pinned_version(name)


def test_the_packages_own_version_and_entry_points() -> None:
    assert PROJECT["version"] == __version__
    assert PROJECT["entry-points"][doctor.PLUGIN_GROUP] == {"lighttransfer": doctor.PLUGIN_VALUE}
    assert PROJECT["scripts"] == {"lt-sglang": "lt_sglang.cli:main"}
