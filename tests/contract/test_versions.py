"""One version of SGLang and one of this package, in every place that names them."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from lt_sglang import __version__, doctor
from lt_sglang.upstream.recorded import SGLANG_VERSION

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


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
    assert metadata.version("lt-sglang") == __version__  # make env writes what pyproject.toml says
    assert PROJECT["entry-points"][doctor.PLUGIN_GROUP] == {"lighttransfer": doctor.PLUGIN_VALUE}
    assert PROJECT["scripts"] == {"lt-sglang": "lt_sglang.cli:main"}


def test_charts_and_images_have_the_packages_version() -> None:
    charts = [
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in ROOT.glob("k8s/charts/*/Chart.yaml")
    ]
    tagged = [
        path for folder in ("deploy", "docs", "k8s") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (*tagged, ROOT / "README.md")]
    tags = [tag for text in texts for tag in re.findall(r"\blt-sglang(?:-gateway)?:(\d[\w.]*)", text)]
    assert charts
    assert {str(chart[key]) for chart in charts for key in ("version", "appVersion")} == {__version__}
    assert tags
    assert set(tags) == {__version__}
