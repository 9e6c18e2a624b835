"""``k8s/render.py`` for models, GPUs and releases of the user's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from k8s.render import main

from ..http_server import serving
from .chart import KUBERNETES, builtin, container, engine_flags, faults, objects, one, template
from .test_manifests import QWEN2

H100 = "NVIDIA-H100-80GB-HBM3"
AWQ_72B = {
    **json.loads(QWEN2),
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128},
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
QWEN3_FP8 = {
    **json.loads(QWEN2),
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "num_attention_heads": 64,
    "intermediate_size": 25600,
    "vocab_size": 151936,
    "quantization_config": {"quant_method": "fp8"},
}


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


@pytest.mark.parametrize(
    ("name", "config", "options", "gib"),
    [
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", AWQ_72B, ["--tp", "4"], 38.6),
        ("mistralai/Mixtral-8x7B", MIXTRAL, ["--tp", "2", "--gpu", H100], 87.0),
        ("Qwen/Qwen3-32B-FP8", QWEN3_FP8, ["--tp", "2", "--gpu", H100], 32.0),
        ("me/private", QWEN3_FP8, ["--set", "model.tokenSecret.name=hub", "--gpu", "NVIDIA-L40S"], 32.0),
        (
            "me/air-gapped",
            QWEN3_FP8,
            [
                *("--set", "image.repository=registry.local/lt-sglang", "--set", "image.pullSecrets={local}"),
                *("--set", "modelCache.extraEnv[0].name=HF_ENDPOINT"),
                *("--set", "modelCache.extraEnv[0].value=http://mirror.local", "--gpu", ""),
                *("--set", "engine.gpu.memoryGiB=140"),
            ],
            32.0,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_command_from_a_name_to_a_manifest(
    name: str,
    config: dict[str, Any],
    options: list[str],
    gib: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Heads, weights and context come from the hub's config.json, and every object is valid."""
    with hub({name: config}, "secret") as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "secret")
        assert main([name, "--lt-mode", "dynamic", *options]) == 0
        fails = main([name, "--lt-mode", "dynamic", *options, "--set", "engine.gpu.memoryGiB=4"])
    printed = capsys.readouterr()
    assert "was not read" not in printed.err
    named = re.search(r"([0-9.]+) GiB of weights on each GPU", printed.err)
    assert fails == 2 and named, "too small a GPU names the weights"
    assert float(named[1]) == pytest.approx(gib / _tp(options), rel=0.02)
    found = objects(printed.out)
    wrong = [fault for v in (KUBERNETES[0], KUBERNETES[-1]) for o in builtin(found) for fault in faults(o, v)]
    assert wrong == []
    assert engine_flags(found)["--context-length"] == str(config["max_position_embeddings"])


def _tp(options: list[str]) -> int:
    return int(options[options.index("--tp") + 1]) if "--tp" in options else 1


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
