"""``k8s/render.py`` for models, GPUs and releases of the user's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from k8s.render import main

from ..http_server import serving
from .chart import container, engine_flags, objects, one, template
from .test_manifests import QWEN2


@contextmanager
def hub(models: dict[str, Any], token: str | None = None) -> Iterator[str]:
    """A hub that has the config.json of ``models``; token: who does not send it is not let in."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/").partition("/resolve/")[0]
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                self.send_response(401)
                self.end_headers()
                return
            known = name in models and self.path.endswith("/resolve/main/config.json")
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(models.get(name)).encode())

        def log_message(self, *_: Any) -> None: ...

    with serving(Hub) as url:
        yield url


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing outside this machine is asked."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN", raising=False)


def test_two_releases_do_not_replace_one_another(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(QWEN2)
    asked = ["me/model", "--config", str(tmp_path), "--lt-mode", "dynamic", "--tp", "4", "--namespace", "llm"]
    names = []
    for name in ("chat", "code"):
        assert main([*asked, "--name", name]) == 0
        found = objects(capsys.readouterr().out)
        assert {item["metadata"]["namespace"] for item in found} == {"llm"}
        names.append({(item["kind"], item["metadata"]["name"]) for item in found})
        gateway = container(one(found, "Deployment", f"{name}-gateway"))["args"]
        assert f"app.kubernetes.io/instance={name}" in gateway, "a gateway finds its own engines alone"
    assert not names[0] & names[1]


def test_what_was_not_checked_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["me/model", "--lt-lazy-layers", "8-23"]
    assert main(asked) == 0
    assert "config.json was not read (http://127.0.0.1:9: " in capsys.readouterr().err


def test_a_name_that_the_hub_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma = {**json.loads(QWEN2), "model_type": "gemma3_text", "layer_types": ["sliding_attention"]}
    with hub({"me/gemma": gemma}) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert main(["me/modle", "--lt-mode", "dynamic"]) == 2
        assert "no such model" in capsys.readouterr().err
        assert main(["me/gemma", "--lt-mode", "dynamic"]) == 2
        assert "sliding window of its own" in capsys.readouterr().err
    with hub({"me/model": json.loads(QWEN2)}) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert main(["me/model", "--lt-lazy-layers", "8-99", "--tp", "4"]) == 2
        assert "layer 99 does not exist" in capsys.readouterr().err
    with hub({}, "secret") as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert main(["me/gated", "--lt-mode", "dynamic"]) == 0
        assert "answers 401; HF_TOKEN is for gated models" in capsys.readouterr().err


def test_a_path_on_a_volume(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is downloaded for it, and without the volume's name it is refused."""
    asked = ["/models/mine", "--lt-mode", "dynamic", "--weights-gib", "14"]
    assert main(asked) == 2
    assert "--claim names the volume" in capsys.readouterr().err
    assert main([*asked, "--claim", "models"]) == 0
    printed = capsys.readouterr()
    assert "it is on the volume" in printed.err
    found = objects(printed.out)
    assert [item["kind"] for item in found].count("Job") == 0
    assert engine_flags(found)["--model-path"] == "/models/mine"


def test_an_object_store(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its config.json is given; the name that clients use is the folder's."""
    asked = ["s3://bucket/models/mine", "--lt-mode", "dynamic"]
    assert main(asked) == 0
    assert "it is in the object store" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(QWEN2)
    assert main([*asked, "--config", str(tmp_path), "--tp", "4"]) == 0
    printed = capsys.readouterr()
    given = engine_flags(objects(printed.out))
    assert printed.err == "" and given["--model-path"] == "s3://bucket/models/mine"
    assert given["--served-model-name"] == "mine" and int(given["--context-length"]) > 0


def test_the_gpus_product_selects_nodes_and_sets_their_memory() -> None:
    def selector(*sets: str) -> dict[str, str] | None:
        spec = one(template(*sets), "Deployment", "lt-sglang-engine")["spec"]["template"]["spec"]
        return spec.get("nodeSelector")

    label = "nvidia.com/gpu.product"
    assert selector() == {label: "NVIDIA-A100-SXM4-80GB"}
    assert selector("engine.gpu.product=NVIDIA-H200", "engine.nodeSelector.pool=a") == {
        label: "NVIDIA-H200",
        "pool": "a",
    }
    assert selector("engine.gpu.product=") is None
    fits = ("model.weightsGiB=120", "engine.gpu.product=NVIDIA-H200")
    assert selector(*fits) == {label: "NVIDIA-H200"}
