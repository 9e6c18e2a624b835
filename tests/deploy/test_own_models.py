"""One command from a model's name to manifests: other models, GPUs, repositories, volumes, registries."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from k8s import render
from k8s.render import main
from tests.unit.test_planner_shapes import MIXTRAL as MIXTRAL_8X7B

from .chart import KUBERNETES, Object, builtin, custom, engine_flags, faults, kinds, objects
from .pod_security import pods, violations
from .test_manifests import QWEN2, Part
from .test_render import hub

H100 = "NVIDIA-H100-80GB-HBM3"
AWQ_72B = {
    **json.loads(QWEN2),
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128},
}
MIXTRAL = {**MIXTRAL_8X7B, "architectures": ["MixtralForCausalLM"], "max_position_embeddings": 32768}
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


@dataclass(frozen=True)
class Case:
    """What is asked for.

    Attributes:
        name: of the model.
        config: its config.json.
        options: of render.py; FOLDER is one with that config.json.
        gib: its weights.
        releases: as many times, under names of their own.
    """

    name: str
    config: dict[str, Any]
    options: tuple[str, ...]
    gib: float
    releases: int = 1

    @property
    def tp(self) -> int:
        return int(self.options[self.options.index("--tp") + 1]) if "--tp" in self.options else 1


AIR_GAPPED = (
    *("--set", "image.repository=registry.local/lt-sglang", "--set", "image.pullSecrets={local}"),
    *("--set", "gateway.image.repository=registry.local/lt-sglang-gateway"),
    *("--set", "modelCache.extraEnv[0].name=HF_ENDPOINT"),
    *("--set", "modelCache.extraEnv[0].value=http://mirror.local"),
    *("--gpu", "", "--set", "engine.gpu.memoryGiB=140"),
)
CASES = {
    "qwen2.5-72b-awq": Case("Qwen/Qwen2.5-72B-Instruct-AWQ", AWQ_72B, ("--tp", "4"), 38.6),
    "mixtral-8x7b": Case("mistralai/Mixtral-8x7B", MIXTRAL, ("--tp", "2", "--gpu", H100), 87.0),
    "qwen3-32b-fp8": Case("Qwen/Qwen3-32B-FP8", QWEN3_FP8, ("--tp", "2", "--gpu", H100), 32.0),
    "a-private-repository": Case(
        "me/private", QWEN3_FP8, ("--set", "model.tokenSecret.name=hub", "--gpu", "NVIDIA-L40S"), 32.0
    ),
    "a-filled-claim": Case(
        "/models/mine", QWEN3_FP8, ("--claim", "models", "--config", "FOLDER", "--gpu", H100), 32.0
    ),
    "an-air-gapped-registry": Case("me/air-gapped", QWEN3_FP8, AIR_GAPPED, 32.0),
    "two-releases": Case("me/model", QWEN3_FP8, ("--gpu", H100, "--namespace", "llm"), 32.0, releases=2),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def commands(case: Case, folder: Path) -> list[list[str]]:
    """What is asked of render.py, no edit by hand."""
    (folder / "config.json").write_text(json.dumps(case.config))
    given = [str(folder) if word == "FOLDER" else word for word in case.options]
    asked = [case.name, "--lt-mode", "dynamic", *given]
    if case.releases == 1:
        return [asked]
    return [[*asked, "--name", f"release-{number}"] for number in range(case.releases)]


@pytest.fixture
def rendered(
    case: Case,
    tmp_path: Path,
    helm3: Path,
    helm4: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[list[Object]]:
    """The objects of the case by Helm 3 and by Helm 4."""
    both = []
    with hub({case.name: case.config}, "secret") as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "secret")
        for program in (helm3, helm4):
            monkeypatch.setattr(render, "helm", lambda program=program: program)
            assert [main(command) for command in commands(case, tmp_path)] == [0] * case.releases
            printed = capsys.readouterr()
            assert "was not read" not in printed.err
            both.append(objects(printed.out))
    return both


@pytest.mark.parametrize("part", [builtin, custom])
def test_every_object_is_valid_for_every_kubernetes(part: Part, rendered: list[list[Object]]) -> None:
    found = part(rendered[0])
    assert found
    assert [fault for version in KUBERNETES for item in found for fault in faults(item, version)] == []


def test_both_helms_agree_and_no_object_replaces_another(case: Case, rendered: list[list[Object]]) -> None:
    assert rendered[0] == rendered[1]
    names = [(item["kind"], item["metadata"]["name"]) for item in rendered[0]]
    assert len(set(names)) == len(names)
    assert kinds(rendered[0]).count("Deployment") == 2 * case.releases


def test_every_pod_keeps_the_level_restricted(rendered: list[list[Object]]) -> None:
    found = [pod for item in rendered[0] for pod in pods(item)]
    assert found and [fault for pod in found for fault in violations(pod)] == []


def test_what_the_config_says_is_in_the_manifest(case: Case, rendered: list[list[Object]]) -> None:
    first = rendered[0][: len(rendered[0]) // case.releases]
    given = engine_flags(first)
    assert given["--context-length"] == str(case.config["max_position_embeddings"])
    assert given["--tp-size"] == str(case.tp) and given["--lt-mode"] == "dynamic"


def test_weights_are_counted(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU that is too small is refused with a sentence that has them."""
    (command, *_) = commands(case, tmp_path)
    with hub({case.name: case.config}) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert main([*command, "--set", "engine.gpu.memoryGiB=4"]) == 2
    named = re.search(r"([0-9.]+) GiB of weights on each GPU", capsys.readouterr().err)
    assert named and float(named[1]) == pytest.approx(case.gib / case.tp, rel=0.02)
