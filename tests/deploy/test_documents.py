"""Commands of README and docs work as printed: charts render, files exist, Secrets are made before."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.tools import sbom
from deploy.tools.fetch import FetchFailed
from k8s.render import CHART, MONITORING, RAY, main, package

from .chart import container, objects, one
from .test_manifests import QWEN2

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "docs/operations.md", "docs/your-model.md", "docs/release.md")
# Files that the commands before one have written.
MADE = ("my-values.yaml", "my-model.yaml", "new.yaml")


def commands(document: str) -> list[list[str]]:
    """The shell commands of a document: of its blocks, and those between backticks."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.S)).replace("\\\n", " ")
    inline = [
        " ".join(code.split())
        for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    ]
    lines = [part for line in [*blocks.splitlines(), *inline] for part in re.split(r" && |; ", line)]
    return [shlex.split(line.partition("   ")[0], comments=True) for line in lines if _is_command(line)]


def _is_command(line: str) -> bool:
    return line.startswith(("helm ", "kubectl ", "make ", "python k8s", "serve deploy")) and "..." not in line


HELM = [
    (document, command)
    for document in DOCUMENTS
    for command in commands(document)
    if command[:2] in (["helm", "install"], ["helm", "upgrade"]) and len(command) > 3
]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """my-values.yaml, as docs/your-model.md has it written."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(QWEN2)
    asked = ["me/model", "--config", str(folder), "--tp", "4", "--lt-mode", "dynamic", "--values-only"]
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main([*asked, "--gpu", "NVIDIA-H100-80GB-HBM3"]) == 0
    file = folder / "my-values.yaml"
    file.write_text("\n".join(printed))
    return file


def rendered(command: list[str], values: Path, helm: Path) -> str:
    """What the command would install."""
    words = [str(values) if word == "my-values.yaml" else word for word in command[2:]]
    words = [word for word in words if word not in ("--create-namespace",)]
    done = subprocess.run(
        [str(helm), "template", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documents_have_commands() -> None:
    assert len(HELM) >= 8 and {document for document, _ in HELM} >= {"README.md", "docs/your-model.md"}


@pytest.mark.parametrize(
    ("document", "command"), HELM, ids=lambda part: part if isinstance(part, str) else part[2]
)
def test_a_helm_command_works_as_printed(
    document: str, command: list[str], values: Path, helm4: Path
) -> None:
    """It renders, and a Secret that it names is made by a command of the same document."""
    found = objects(rendered(command, values, helm4))
    text = json.dumps(found)
    named = {name for name in re.findall(r'"secretKeyRef": {"name": "([^"]+)"', text) if name}
    asked = (ROOT / document).read_text(encoding="utf-8")
    assert all(f"create secret generic {name} " in asked for name in named), named
    if document == "README.md" and str(CHART.relative_to(ROOT)) in command:
        assert "PodMonitor" not in {item["kind"] for item in found}, "prometheus-operator is not presumed"
        assert container(one(found, "Deployment", "llama-engine"))["image"] == "REGISTRY/lt-sglang:0.1.0"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_targets_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = set(re.findall(r"\b((?:k8s|deploy|docs|tests)/[\w./-]*[\w])", text)) - set(MADE)
    missing = [path for path in paths if not (ROOT / path).exists() and "*" not in path]
    assert not missing
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands(document):
        if command[0] == "make":
            assert f"\n{command[1]}:" in makefile, command


def test_a_models_values_are_those_of_its_manifest(values: Path) -> None:
    read = json.loads(values.read_text())
    assert read["model"]["kvHeads"] == 8 and read["engine"]["gpu"] == {"product": "NVIDIA-H100-80GB-HBM3"}
    assert read["engine"]["tensorParallel"] == 4 and read["lightTransfer"]["mode"] == "dynamic"


def versions() -> Iterator[tuple[str, str]]:
    for chart in (CHART, MONITORING, RAY):
        found = re.search(r"^version: (.*)$", (chart / "Chart.yaml").read_text(encoding="utf-8"), re.M)
        assert found
        yield chart.name, found[1]


@pytest.mark.parametrize("program", ["helm3", "helm4"])
def test_charts_can_be_packaged(program: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What is in the archive renders as the folder does."""
    helm: Path = request.getfixturevalue(program)
    for chart in (CHART, MONITORING, RAY):
        package(chart, tmp_path, helm)
    files = {f"{name}-{version}.tgz" for name, version in versions()}
    assert {file.name for file in tmp_path.iterdir()} == files
    archive = next(tmp_path.glob("lt-sglang-0*.tgz"))
    texts = [
        subprocess.run(
            [str(helm), "template", "x", str(where), "--set", "model.name=a/b"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for where in (archive, CHART)
    ]
    assert texts[0] == texts[1]


def test_a_bill_of_materials_names_every_package(tmp_path: Path) -> None:
    try:
        files = sbom.write(tmp_path)
    except FetchFailed as error:
        pytest.skip(str(error))
    for file, lock in zip(files, sbom.LOCKS.values(), strict=True):
        bill = json.loads(file.read_text(encoding="utf-8"))
        assert bill["bomFormat"] == "CycloneDX"
        lines = (ROOT / "deploy" / "docker" / lock).read_text(encoding="utf-8").splitlines()
        wanted = {line for line in lines if line and not line.startswith("#")}
        assert {f"{part['name']}=={part['version']}" for part in bill["components"]} == wanted
