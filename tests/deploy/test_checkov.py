"""checkov on the manifests; what is left out is left out with a reason in k8s/checkov.yaml."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from k8s.render import MANIFESTS

pytestmark = pytest.mark.slow

DOCKER = MANIFESTS.parents[1] / "deploy" / "docker"
CONFIG = MANIFESTS.parent / "checkov.yaml"


def check(folder: Path, path: Path, home: Path, framework: str = "kubernetes") -> dict[str, Any]:
    """checkov's report on ``folder``."""
    command = [sys.executable, "-m", "checkov.main", "--config-file", str(CONFIG), "--directory", str(folder)]
    command += ["--framework", framework]
    env = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "HOME": str(home)}
    done = subprocess.run(
        [*command, "--output", "json"], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.stdout, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def test_no_check_fails(checkov_path: Path, tmp_path: Path) -> None:
    report = check(MANIFESTS, checkov_path, tmp_path)
    failed = {
        (item["check_id"], item["check_name"], item["resource"])
        for item in report["results"]["failed_checks"]
    }
    assert not failed
    assert report["summary"]["resource_count"] > 50


def test_images(checkov_path: Path, tmp_path: Path) -> None:
    """The Dockerfile, read by checkov's parser; and one that is worse."""
    report = check(DOCKER, checkov_path, tmp_path, "dockerfile")
    assert report["results"]["failed_checks"] == []
    assert report["summary"]["passed"] > 100 and report["summary"]["parsing_errors"] == 0
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    (tmp_path / "Dockerfile").write_text(text.replace("USER 10001:10001", "RUN sudo true"))
    worse = check(tmp_path, checkov_path, tmp_path, "dockerfile")
    assert {item["check_id"] for item in worse["results"]["failed_checks"]} >= {"CKV_DOCKER_3"}


def test_every_left_out_check_has_a_reason() -> None:
    lines = [line for line in CONFIG.read_text(encoding="utf-8").splitlines() if line.startswith("  - CKV")]
    assert lines and all("   # " in line for line in lines)


def test_checkov_itself(checkov_path: Path, tmp_path: Path) -> None:
    text = (MANIFESTS / "qwq-32b-tp2.yaml").read_text(encoding="utf-8")
    (tmp_path / "worse.yaml").write_text(text.replace("readOnlyRootFilesystem: true", "privileged: true"))
    assert check(tmp_path, checkov_path, tmp_path)["results"]["failed_checks"]
