"""SGLang's model gateway in front of two CPU engines, with the chart's flags; one goes down and returns."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import requests

from lt_sglang.launch.processes import free_port, kill_tree, spawn
from tests.engine.models import ensure_model
from tests.engine.server import Server, ServerSpec

from .chart import container, one, template
from .test_engine_metrics import FLAGS, LAZY, scrape, values

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SPEC = ServerSpec("behind-gateway", partial(ensure_model, "llama"), LAZY, FLAGS)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    folder = tmp_path_factory.mktemp("engines")
    servers = [Server(SPEC, folder / f"log{number}") for number in range(2)]
    try:
        for server in servers:
            server.launch()
        for server in servers:
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers:
            server.stop()


def chart_flags(*sets: str) -> list[str]:
    """The gateway's arguments in the chart, but for where it finds engines and what it listens on."""
    args = container(one(template(*sets), "Deployment", "lt-sglang-gateway"))["args"]
    left_out = ("--host", "--port", "--prometheus", "--service-discovery", "--selector")
    return [arg for arg in args if arg.startswith("--") and not arg.startswith(left_out)]


@pytest.fixture(scope="module")
def url(engines: list[Server], gateway_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gateway(engines, gateway_path, tmp_path_factory.mktemp("gateway")) as found:
        yield found


@contextmanager
def gateway(engines: list[Server], gateway_path: Path, folder: Path, *sets: str) -> Iterator[str]:
    """A gateway before the engines; ``sets``: of the chart."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host=127.0.0.1", f"--port={port}"]
    command += [f"--prometheus-port={free_port()}", "--prometheus-host=127.0.0.1", *chart_flags(*sets)]
    command += ["--worker-urls", *(engine.url for engine in engines)]
    process = spawn(command, {"PYTHONPATH": str(gateway_path), "PATH": "/usr/bin:/bin"}, folder / "log")
    found = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: requests.get(f"{found}/readiness", timeout=2).status_code == 200, 120)
        yield found
    finally:
        kill_tree(process)
        print((folder / "log").read_text(errors="replace")[-3000:])


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if what():
                return
        except requests.RequestException:
            pass
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)


def ask(url: str, seed: int, length: int = 60) -> int:
    rng = random.Random(seed)
    body = {
        "text": "".join(chr(rng.randrange(97, 123)) for _ in range(length)),
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
    }
    return requests.post(f"{url}/generate", json=body, timeout=120).status_code


def ask_many(url: str, seeds: range) -> list[int]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(partial(ask, url), seeds))


def served(engine: Server) -> float:
    """Requests the engine has finished."""
    time.sleep(1.5)
    return sum(values(scrape(engine), "lt_requests_total"))


def test_requests_reach_both_engines(url: str, engines: list[Server]) -> None:
    before = [served(engine) for engine in engines]
    assert set(ask_many(url, range(40))) == {200}
    gained = [served(engine) - count for engine, count in zip(engines, before, strict=True)]
    assert sum(gained) == 40 and min(gained) > 0


def test_a_prompt_goes_where_its_prefix_is(engines: list[Server], gateway_path: Path, tmp_path: Path) -> None:
    """By the policy cache_aware, which conversations want; the default spreads."""
    before = [served(engine) for engine in engines]
    with gateway(engines, gateway_path, tmp_path, "gateway.policy=cache_aware") as url:
        for _ in range(6):
            assert ask(url, seed=1000, length=400) == 200
    gained = [served(engine) - count for engine, count in zip(engines, before, strict=True)]
    assert sorted(gained) == [0, 6], "cache-aware"


def test_one_engine_down_and_back_again(url: str, engines: list[Server]) -> None:
    victim, other = engines
    victim.stop()
    assert set(ask_many(url, range(100, 124))) == {200}, "the gateway tries the other one"
    assert set(ask_many(url, range(200, 224))) == {200}
    victim.launch()
    victim.wait_until_ready()

    # Prompts of their own each time: known ones stay with the engine that has them cached.
    first = iter(range(300, 10_000, 16))

    def back() -> bool:
        start = next(first)
        assert set(ask_many(url, range(start, start + 16))) == {200}
        return served(victim) > 0

    wait_until(back, 120)
    assert other.alive


def test_replicas_of_a_scenario(gateway_path: Path, tmp_path: Path) -> None:
    """The script that measures them, with a tiny model."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "loadtest/replicas.py"), "loadtest/scenarios/tp8/5-qwq.yaml"]
    command += ["--rehearse", "--replicas", "2", "--tp-size", "1"]
    command += ["--gateway", str(gateway_path), "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sides = [line for line in done.stdout.splitlines() if line.startswith(("baseline", "lighttransfer"))]
    assert len(sides) == 2 and all("completed 6, errors 0" in line for line in sides)
    for number in range(2):
        log = (tmp_path / f"lighttransfer-{number}.log").read_text(errors="replace")
        assert "Decode batch" in log
