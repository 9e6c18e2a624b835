"""The documents name files, functions, flags, commands and results that exist.

A pointer in the text is written ``file.py:function`` or ``file.py:Class.method``, the file from the
repository's root or from ``lt_sglang``. Links, paths, modules, make targets and
``--lt-`` flags are checked wherever they stand, code blocks included.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from loadtest import make_results, readme_figure
from lt_sglang.cli import COMMANDS
from lt_sglang.launch import admin
from lt_sglang.launch.options import OPTIONS_HELP, LtOptions

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "lt_sglang"
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
FOLDERS = "|".join(
    sorted(
        path.name
        for root in (REPOSITORY, PACKAGE)
        for path in root.iterdir()
        if path.is_dir() and path.name[0] not in "._"
    )
)
POINTER = re.compile(r"`([\w./-]+\.py)::?([A-Za-z_][\w.]*)`")
PATH = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]+\.(?:py|md|json|yaml|toml|svg|png))(?![\w*{{])")
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(r"-m ((?:tests|lt_sglang)\.[\w.]+)")
TARGET = re.compile(r"(?:`|^|\$ )make ([a-z][a-z-]*)", re.MULTILINE)
FLAG = re.compile(r"--lt-[a-z-]+[a-z]")
COMMAND = re.compile(r"(?:`|^)lt-sglang ([a-z]+)", re.MULTILINE)
# Not of serve: of the locust file (docs/benchmarks.md).
LOCUST = {"--lt-scenario", "--lt-case", "--lt-out"}

each = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def located(name: str) -> Path | None:
    """The file that a text calls ``name``, from the root or from the package."""
    return next((root / name for root in (REPOSITORY, PACKAGE) if (root / name).exists()), None)


@cache
def names(file: Path) -> frozenset[str]:
    """What a module defines: functions, classes, their members, and its own variables."""
    found: set[str] = set()

    def read(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                read(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)

    read(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    lines = [line.lstrip("#").strip() for line in text_of(document).splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@each
def test_pointers_lead_to_code(document: Path) -> None:
    for name, what in POINTER.findall(text_of(document)):
        file = located(name)
        assert file is not None, f"{name} does not exist"
        assert what in names(file), f"{name} defines no {what}"


@each
def test_paths_exist(document: Path) -> None:
    missing = [name for name in PATH.findall(text_of(document)) if located(name) is None]
    assert not missing


@each
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(text_of(document)):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{target.name} has no heading {anchor}"


@each
def test_commands_modules_targets_and_flags_exist(document: Path) -> None:
    text = text_of(document)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    flags = {f"--lt-{name.replace('_', '-')}" for name in LtOptions.__dataclass_fields__}
    assert {name for name in MODULE.findall(text) if importlib.util.find_spec(name) is None} == set()
    assert {name for name in TARGET.findall(text) if not re.search(rf"^{name}:", makefile, re.M)} == set()
    assert set(COMMAND.findall(text)) <= set(COMMANDS)
    unknown = set(FLAG.findall(text)) - flags - LOCUST - {"--lt-admin-routes"}
    assert unknown == set()


# ---- single documents


def table_rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_readme_is_short() -> None:
    assert len(text_of(REPOSITORY / "README.md").splitlines()) <= 100


@pytest.mark.parametrize(
    "row",
    table_rows(text_of(REPOSITORY / "README.md"), "What it gains"),
    ids=lambda row: row[0],
)
def test_the_readme_shows_what_its_result_files_say(row: list[str]) -> None:
    _, stock, ours, ratio, link = row
    (name,) = LINK.findall(link)
    result = json.loads((REPOSITORY / name).read_text(encoding="utf-8"))
    kind = "decode_tokens_per_second" if "decode" in stock else "output_throughput"
    for shown, side in ((stock, "baseline"), (ours, "lighttransfer")):
        running, speed = (float(number) for number in re.findall(r"[\d.]+", shown))
        assert running == result[side]["requests_running"]
        assert speed == round(result[side][kind])
    assert ratio == f"{result['ratio'][kind]:.2f}x"


def numbers_in(value: Any) -> Iterator[float]:
    """All numbers of a result file, at any depth."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def sentences(text: str) -> list[str]:
    """Of running text: without code blocks and tables."""
    text = re.sub(r"^(```.*?^```|\|.*?)$", "", text, flags=re.MULTILINE | re.DOTALL)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [one for part in paragraphs for one in re.split(r"(?<=[.:])\s+(?=[A-Z`*\[])", part) if one]


def test_measured_numbers_of_the_readme_are_in_the_files_that_their_sentences_link() -> None:
    linked = 0
    for sentence in sentences(text_of(REPOSITORY / "README.md")):
        files = [link for link in LINK.findall(sentence) if re.search(r"loadtest/results/.*\.json$", link)]
        if not files:
            assert not re.search(r"\d\.\d+x|\d (?:tok/s|%)", sentence), f"no result file: {sentence}"
            continue
        linked += 1
        known = [n for name in files for n in numbers_in(json.loads(text_of(REPOSITORY / name)))]
        # Not of names: 16K, SmolLM2-135M.
        for shown in re.findall(r"(?<![\w./-])(\d+(?:\.\d+)?)(?=x?[\s,.;:)])", LINK.sub("](", sentence)):
            digits = len(shown.partition(".")[2])
            assert any(round(n, digits) == float(shown) for n in known), f"{shown} is not in {files}"
    assert linked >= 2


def test_figures_of_the_page_of_results_are_in_the_files_that_they_link() -> None:
    """A figure is the text of its link; none stands alone."""
    page = REPOSITORY / "docs/results.md"
    text = text_of(page)
    assert len(text.splitlines()) <= 60
    figures = re.findall(r"\[([^\]]+)\]\((\S+/results/\S+\.json)\)", text)
    assert len(figures) > 40
    for shown, link in figures:
        result = json.loads(text_of(page.parent / link))
        known = list(numbers_in(result["ratio"] if shown.endswith("x") else result))
        for number in re.findall(r"\d[\d,]*(?:\.\d+)?", shown):
            plain = number.replace(",", "")
            digits = len(plain.partition(".")[2])
            assert any(round(n, digits) == float(plain) for n in known), f"{shown} is not in {link}"
    alone = re.sub(r"\[[^\]]*\]\(\S+\)", "", text)
    assert not re.search(r"\d\.\d+x|\d (?:ms|%)", alone)


def test_the_plot_is_of_the_result_files() -> None:
    drawn = readme_figure.svg()
    assert readme_figure.FILE.read_text(encoding="utf-8") == drawn, "run python -m loadtest.make_results"


def test_the_tables_are_of_the_result_files() -> None:
    shown = (make_results.RESULTS / "README.md").read_text(encoding="utf-8")
    assert shown == make_results.page(), "run python -m loadtest.make_results"


def test_every_option_is_explained() -> None:
    flags = {f"--lt-{name.replace('_', '-')}" for name in LtOptions.__dataclass_fields__}
    assert flags <= set(FLAG.findall(OPTIONS_HELP))
    for shown in (OPTIONS_HELP, admin.HELP):
        assert shown in text_of(REPOSITORY / "docs/serving.md"), f"docs/serving.md does not show:\n{shown}"


def test_the_package_map_is_whole() -> None:
    shown = set()
    for first, _ in table_rows(text_of(REPOSITORY / "docs/architecture.md"), "Packages"):
        shown |= set(re.findall(r"`([\w.]+)`", first))
    found = {
        path.name
        for path in PACKAGE.iterdir()
        if (path.is_dir() or path.suffix == ".py") and not path.name.startswith("_")
    }
    assert shown == found


def test_every_decision_is_listed() -> None:
    folder = REPOSITORY / "docs/decisions"
    listed = set(LINK.findall(text_of(folder / "README.md")))
    assert listed == {path.name for path in folder.glob("*.md")} - {"README.md"}


def test_the_glossary_has_terms_and_says_what_a_sink_is_not() -> None:
    text = text_of(REPOSITORY / "docs/glossary.md")
    terms = [row for heading in ("Layers", "Memory", "A request's way") for row in table_rows(text, heading)]
    assert len(terms) >= 30 and all(len(row) == 4 and all(row) for row in terms)
    assert "not FlashInfer's sink" in text
