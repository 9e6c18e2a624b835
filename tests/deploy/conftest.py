"""Programs the tests run; fetched once into the folder that also keeps the Python environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.tools.fetch import FetchFailed, folder


def _tool(name: str) -> Path:
    try:
        return folder(name)
    except FetchFailed as error:
        pytest.skip(f"{name} cannot be had here: {error}")


@pytest.fixture(scope="session")
def helm3() -> Path:
    """Helm 3."""
    return _tool("helm3") / "helm"


@pytest.fixture(scope="session")
def helm4() -> Path:
    """Helm 4."""
    return _tool("helm4") / "helm"


@pytest.fixture(scope="session")
def promtool() -> Path:
    """Prometheus' own checker."""
    return _tool("prometheus") / "promtool"


@pytest.fixture(scope="session")
def prometheus() -> Path:
    """Prometheus."""
    return _tool("prometheus") / "prometheus"


@pytest.fixture(scope="session")
def gateway_path() -> Path:
    """What PYTHONPATH holds for SGLang's model gateway."""
    return _tool("gateway")


@pytest.fixture(scope="session")
def image_path() -> Path:
    """What PYTHONPATH holds for what the engine's image has beyond the environment."""
    return _tool("image")


@pytest.fixture(scope="session")
def checkov_path() -> Path:
    """What PYTHONPATH holds for checkov."""
    return _tool("checkov")
