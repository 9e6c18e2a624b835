"""``lt-sglang serve`` up to the point where the server would start, and the announcer beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from lt_sglang.cli import server
from lt_sglang.config import CONFIG_KEY, LIST, LightTransferConfig
from lt_sglang.demo.smollm2 import DemoModelMissing
from lt_sglang.errors import LightTransferError
from lt_sglang.launch import ready
from lt_sglang.launch.cpu import CPU_LIMITS, CompilerMissing, cpu_server_args
from lt_sglang.launch.plan import Launch, Machine, plan_launch, stock_command
from lt_sglang.names import BACKEND

from ..http_server import serving

CONFIG: dict[str, Any] = {"num_hidden_layers": 8}
SMOLLM2: dict[str, Any] = {"num_hidden_layers": 30}


@dataclass
class Fake:
    """A machine that says what it is told to, and remembers what it was asked."""

    gpu: bool = True
    config: dict[str, Any] | None = field(default_factory=lambda: dict(CONFIG))
    asked_tp: list[int] = field(default_factory=list)
    error: Exception | None = None

    def launch(self, *argv: str, env: Mapping[str, str] | None = None) -> Launch:
        machine = Machine(
            has_gpu=lambda: self.gpu,
            cpu_environment=self.environment,
            demo_model=self.demo,
            model_config=lambda path, revision: self.config,
        )
        return plan_launch(list(argv), env or {"HOME": "/root"}, machine)

    def environment(self, tp: int, base: Mapping[str, str]) -> dict[str, str]:
        self.asked_tp.append(tp)
        if self.error:
            raise self.error
        return {"OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": "/stub"}

    def demo(self) -> Path:
        if isinstance(self.error, DemoModelMissing):
            raise self.error
        return Path("/demo/model")


def values(launch: Launch, flag: str) -> list[str]:
    return [launch.argv[index + 1] for index, arg in enumerate(launch.argv) if arg == flag]


def overrides(launch: Launch) -> dict[str, Any]:
    (text,) = values(launch, "--json-model-override-args")
    made: dict[str, Any] = json.loads(text)
    return made


def test_on_a_gpu() -> None:
    fake = Fake()
    launch = fake.launch("--model-path", "m", "--lt-lazy-layers", "1-3", "--port=4000", "--enable-metrics")
    assert launch.argv[:4] == ("--model-path", "m", "--port=4000", "--enable-metrics")
    assert values(launch, "--attention-backend") == [BACKEND]
    assert overrides(launch) == {
        CONFIG_KEY: LightTransferConfig((1, 2, 3), source="--lt-lazy-layers").to_dict()
    }
    assert not launch.on_cpu
    assert fake.asked_tp == []
    assert launch.env["HOME"] == "/root"
    assert "OMP_NUM_THREADS" not in launch.env
    assert "--device" not in launch.argv
    assert launch.url == "http://127.0.0.1:4000"


def test_given_overrides_are_kept_and_ours_added() -> None:
    given = json.dumps(
        {"rope_scaling": {"factor": 2}, "lighttransfer": {"lazy_layers": [1], "sink_tokens": 9}}
    )
    launch = Fake().launch("m", f"--json-model-override-args={given}", "--lt-recent-tokens", "50")
    made = overrides(launch)
    assert made["rope_scaling"] == {"factor": 2}
    config = LightTransferConfig.from_dict(made[CONFIG_KEY])
    assert (config.lazy_layers, config.sink_tokens, config.recent_tokens) == ((1,), 9, 50)


def test_our_backend_may_be_named() -> None:
    launch = Fake().launch("m", "--lt-lazy-layers=1", "--attention-backend", BACKEND)
    assert values(launch, "--attention-backend") == [BACKEND]


@pytest.mark.parametrize(
    "flag", ["--attention-backend", "--prefill-attention-backend", "--decode-attention-backend"]
)
def test_another_backend_is_refused_by_name(flag: str) -> None:
    with pytest.raises(LightTransferError, match=rf"{flag} flashinfer: lt-sglang serves with {BACKEND}"):
        Fake().launch("m", "--lt-lazy-layers=1", flag, "flashinfer")


def test_a_model_that_cannot_be_read_is_left_to_sglang() -> None:
    launch = Fake(config=None).launch("bucket://model")
    assert launch.config is None
    assert "--json-model-override-args" not in launch.argv
    assert values(launch, "--attention-backend") == [BACKEND]


def test_a_model_without_lazy_layers_is_refused() -> None:
    with pytest.raises(LightTransferError, match=r"none are known for m. With --lt-mode dynamic"):
        Fake().launch("m")


def test_on_a_cpu() -> None:
    fake = Fake(gpu=False)
    launch = fake.launch("m", "--lt-lazy-layers=1", "--tp", "2")
    assert launch.on_cpu
    assert fake.asked_tp == [2]
    assert launch.env["LD_LIBRARY_PATH"] == "/stub"
    assert launch.argv[-len(cpu_server_args()) :] == tuple(cpu_server_args())
    assert launch.model_path == "m"
    for flag, value in CPU_LIMITS:
        assert values(launch, flag) == [value] and flag in launch.limits
    assert "--max-total-tokens" not in Fake().launch("m", "--lt-lazy-layers=1").argv


def test_cpu_arguments_given_are_kept() -> None:
    launch = Fake(gpu=False).launch(
        "m", "--lt-lazy-layers=1", "--mem-fraction-static=0.3", "--max-running-requests", "2"
    )
    assert values(launch, "--max-total-tokens") == []
    assert values(launch, "--max-running-requests") == ["2"]
    assert values(launch, "--device") == ["cpu"]


def test_json_schemas_are_not_switched_off() -> None:
    """SGLang's own grammar backend stays: without one, response_format is answered with 400."""
    assert "--grammar-backend" not in Fake(gpu=False).launch("m", "--lt-lazy-layers=1").argv


def test_a_cpu_may_be_asked_for_on_a_gpu_machine() -> None:
    launch = Fake(gpu=True).launch("m", "--lt-lazy-layers=1", "--device", "cpu")
    assert launch.on_cpu
    assert values(launch, "--device") == ["cpu"]


def test_another_device_is_left_to_sglang() -> None:
    launch = Fake(gpu=False).launch("m", "--lt-lazy-layers=1", "--device", "cuda")
    assert not launch.on_cpu


def test_demo_model_on_a_cpu() -> None:
    launch = Fake(gpu=False, config=SMOLLM2).launch("--port", "31000", "--max-total-tokens=999")
    assert launch.model_path == "/demo/model"
    assert values(launch, "--model-path") == ["/demo/model"]
    assert launch.config is not None
    assert len(launch.config.lazy_layers) == 15
    assert launch.config.source == "the demonstration"
    assert not {7, 18, 23} & set(launch.config.lazy_layers), "the layers it retrieves with"
    assert launch.config.dynamic and launch.config.score == LIST, "cut after the prompt: docs/quality.md"
    for flag, value in CPU_LIMITS:
        assert values(launch, flag) == ([] if flag == "--max-total-tokens" else [value])
    assert "http://127.0.0.1:31000/v1/chat/completions" in launch.try_line
    assert launch.env[server.TRY_VARIABLE] == launch.try_line


def test_demo_model_with_other_layers() -> None:
    launch = Fake(gpu=False).launch("--lt-lazy-layers", "2")
    assert launch.config is not None
    assert launch.config.lazy_layers == (2,) and not launch.config.dynamic
    given = json.dumps({CONFIG_KEY: {"lazy_layers": "3"}})
    launch = Fake(gpu=False).launch("--json-model-override-args", given)
    assert launch.config is not None
    assert launch.config.lazy_layers == (3,)


def test_demo_model_with_other_layers_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lt.json"
    file.write_text('{"lazy_layers": "4"}')
    launch = Fake(gpu=False).launch("--lt-config", str(file))
    assert launch.config is not None
    assert launch.config.lazy_layers == (4,)


@pytest.mark.parametrize(
    ("flags", "mode", "score"),
    [
        (("--lt-mode", "static"), "static", "residual-error"),
        (("--lt-mode", "dynamic"), "dynamic", "residual-error"),
        (("--lt-mode", "dynamic", "--lt-score", "error-mass"), "dynamic", "error-mass"),
        (("--lt-recent-tokens", "252"), "dynamic", LIST),
    ],
)
def test_demo_model_in_another_mode(flags: tuple[str, ...], mode: str, score: str) -> None:
    config = Fake(gpu=False, config=SMOLLM2).launch(*flags).config
    assert config is not None
    assert (config.mode, config.score) == (mode, score)


def test_demo_model_on_a_gpu() -> None:
    launch = Fake(config=SMOLLM2).launch()
    assert launch.model_path == "/demo/model" and not launch.on_cpu
    assert launch.config is not None and launch.config.source == "the demonstration"


@pytest.mark.parametrize("error", [DemoModelMissing("install it\nso"), CompilerMissing("no cc")])
def test_missing_pieces_are_errors_of_ours(error: Exception) -> None:
    with pytest.raises(LightTransferError, match=str(error)[:5]):
        Fake(gpu=False, config=SMOLLM2, error=error).launch()


def test_a_failed_plan_asks_nothing_of_the_machine() -> None:
    fake = Fake(gpu=False)
    with pytest.raises(LightTransferError):
        fake.launch("m", "--lt-lazy-layers", "oops")
    assert fake.asked_tp == []


def test_the_try_line_is_valid() -> None:
    for line in (
        Fake().launch("m", "--lt-lazy-layers=1").try_line,
        Fake(gpu=False, config=SMOLLM2).launch().try_line,
    ):
        body = line.partition("-d '")[2].removesuffix("'")
        assert json.loads(body)["max_tokens"] > 0
        assert "'" not in body


@pytest.mark.parametrize(
    ("argv", "host", "url"),
    [
        ([], None, "http://127.0.0.1:30000"),
        ([], "0.0.0.0", "http://127.0.0.1:30000"),
        ([], "10.0.0.7", "http://10.0.0.7:30000"),
        ([], "::1", "http://[::1]:30000"),
        ([], "::", "http://[::1]:30000"),
        (["--ssl-certfile", "x"], None, "https://127.0.0.1:30000"),
    ],
)
def test_base_url(argv: list[str], host: str | None, url: str) -> None:
    assert ready.base_url(argv, host, 30000) == url


def test_only_the_first_node_serves_http() -> None:
    launch = Fake().launch("m", "--lt-lazy-layers=1", "--nnodes", "2", "--node-rank", "1")
    assert launch.env[server.URL_VARIABLE] == ""


class _Ready(BaseHTTPRequestHandler):
    answers: list[int]

    def do_GET(self) -> None:
        self.send_response(self.answers.pop(0) if self.path == "/ready" else 404)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def ready_server() -> Iterator[tuple[str, list[int]]]:
    answers: list[int] = []
    handler = type("Handler", (_Ready,), {"answers": answers})
    with serving(handler) as url:
        yield url, answers


def test_announce(
    ready_server: tuple[str, list[int]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers = ready_server
    answers += [503, 503, 200]
    monkeypatch.setattr(server, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.announce(url, "curl this", poll_seconds=0.01)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("lt-sglang: ") for line in lines)
    assert any("still starting" in line for line in lines)
    assert lines[-1] == "lt-sglang: try: curl this"
    assert "ready after" in lines[-2]
    assert answers == []


def test_not_ready_when_nobody_listens() -> None:
    assert not ready.is_ready("http://127.0.0.1:9", os.getpid(), timeout_seconds=0.5)


def test_another_process_s_server_is_not_announced(
    ready_server: tuple[str, list[int]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers 200, but it is not the process that was started, nor one below it."""
    url, answers = ready_server
    answers += [200] * 1000
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        assert not ready.is_ready(url, started.pid)
        monkeypatch.setattr(os, "getpid", lambda: started.pid)
        monkeypatch.setattr(server, "GIVE_UP_SECONDS", 0.3)
        server.announce(url, "curl this", poll_seconds=0.01)
        started.kill()
    assert "ready" not in capsys.readouterr().err


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_stock_sglang_is_started_as_ours_without_the_plugin(gpu: bool) -> None:
    fake = Fake(gpu=gpu)
    machine = Machine(has_gpu=lambda: gpu, cpu_environment=fake.environment)

    def started(*flags: str) -> tuple[list[str], dict[str, str]]:
        return stock_command(["--model-path", "m", "--tp-size", "2", *flags], {"HOME": "/root"}, machine)

    command, env = started()
    assert command[1:4] == ["-m", "lt_sglang.launch.tied", "sglang.launch_server"]
    assert env["SGLANG_PLUGINS"] == "none" and env["HOME"] == "/root"
    assert ("--device" in command) == ("torch_native" in command) == (not gpu)
    assert fake.asked_tp == ([] if gpu else [2])
    command, _ = started("--device", "cpu", "--attention-backend", "triton")
    assert command.count("--device") == 1 and "torch_native" not in command
    assert fake.asked_tp[-1:] == [2]
