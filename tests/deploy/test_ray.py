"""The Ray Serve application for real: two CPU engines, a killed replica under load, a drain."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import requests

from lt_sglang.launch.processes import free_port
from tests.engine.environment import server_environment
from tests.engine.models import ensure_model

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.engine, pytest.mark.slow]

START_SECONDS = 600
FLAGS = (
    *("--lt-lazy-layers=1,3,5", "--lt-sink-tokens=4", "--lt-recent-tokens=60"),
    *("--dtype=float32", "--random-seed=1", "--max-total-tokens=6400", "--mem-fraction-static=0.3"),
    *("--chunked-prefill-size=256", "--max-running-requests=8", "--context-length=4096"),
)
GREEDY = {"temperature": 0, "ignore_eos": True}


@dataclass
class Outcome:
    """One streamed request: status, pieces, and the error that broke it, if any."""

    status: int | None = None
    tokens: list[int] = field(default_factory=list)
    error: str | None = None
    finished: bool = False

    @property
    def started(self) -> bool:
        return bool(self.tokens)


@dataclass
class Client:
    url: str

    def body(self, prompt: list[int], new_tokens: int, stream: bool) -> dict[str, Any]:
        return {
            "input_ids": prompt,
            "stream": stream,
            "sampling_params": {**GREEDY, "max_new_tokens": new_tokens},
        }

    def whole(self, prompt: list[int], new_tokens: int = 8) -> requests.Response:
        return requests.post(f"{self.url}/generate", json=self.body(prompt, new_tokens, False), timeout=300)

    def stream(self, prompt: list[int], new_tokens: int, seen: threading.Event | None = None) -> Outcome:
        outcome = Outcome()
        try:
            with requests.post(
                f"{self.url}/generate", json=self.body(prompt, new_tokens, True), stream=True, timeout=300
            ) as answer:
                outcome.status = answer.status_code
                for line in answer.iter_lines(chunk_size=1):
                    if line == b"data: [DONE]":
                        outcome.finished = True
                    elif line.startswith(b"data: "):
                        outcome.tokens = json.loads(line[6:])["output_ids"]
                        if seen is not None:
                            seen.set()
        except requests.RequestException as error:
            outcome.error = str(error)
        return outcome


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Ray, Serve and the application with two engines."""
    from ray import serve

    from deploy.ray.app import build

    before = dict(os.environ)
    os.environ.update(server_environment())
    os.environ["RAY_SERVE_LOG_TO_STDERR"] = "1"
    port = free_port()
    try:
        ray.init(num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=True)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = {
            "model": str(ensure_model("llama")),
            "gpu": False,
            "cpus": 1,
            "args": list(FLAGS),
            "replicas": 2,
            "start_seconds": START_SECONDS,
            "drain_seconds": 120,
        }
        serve.run(build(settings), name="lt")
        yield Client(f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


def engine_processes() -> list[psutil.Process]:
    """The server process of each engine, its launcher's descendants left out."""
    found = []
    for process in psutil.Process().children(recursive=True) + list(psutil.process_iter()):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "lt_sglang.cli.server" in command and process not in found:
            found.append(process)
    return [process for process in found if process.parent() not in found]


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 512) for _ in range(rng.randrange(50, 300))] for _ in range(count)]


def urls() -> list[str]:
    """Where the engines listen, past Ray."""
    ports = [
        arg.partition("=")[2]
        for process in engine_processes()
        for arg in process.cmdline()
        if arg.startswith("--port=")
    ]
    return [f"http://127.0.0.1:{port}" for port in ports]


def healthy(client: Client, engines: int) -> bool:
    """Whether so many engines take requests, and the front too."""
    try:
        ready = [requests.get(f"{url}/ready", timeout=5).status_code == 200 for url in urls()]
    except requests.RequestException:
        return False
    return len(ready) == engines and all(ready) and client.whole([5, 6, 7]).status_code == 200


def wait_until(what: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)


def test_both_engines_serve_and_stream(client: Client) -> None:
    assert len(engine_processes()) == 2
    (prompt,) = prompts(1, 1)
    whole = client.whole(prompt, 32).json()["output_ids"]
    pieces = client.stream(prompt, 32)
    assert pieces.finished and pieces.tokens == whole
    assert client.whole([]).status_code == 400, "an engine's own answer passes as it is"
    models = requests.get(f"{client.url}/v1/models", timeout=30).json()
    assert models["data"]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda p: client.stream(p, 24), prompts(32, 2)))
    assert all(answer.finished and answer.status == 200 for answer in answers)


def test_stream_comes_in_pieces(client: Client) -> None:
    """The first piece is there long before the last."""
    seen = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.stream, prompts(1, 3)[0], 400, seen)
        assert seen.wait(60)
        assert not running.done()
        assert running.result().finished


def aborted() -> float:
    """Requests that engines gave up, over all of them."""
    lines = [line for url in urls() for line in requests.get(f"{url}/metrics", timeout=10).text.splitlines()]
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("sglang:num_aborted_requests_total{")
    )


def test_a_client_that_leaves_frees_its_slots(client: Client) -> None:
    """Through front and replica down to the engine, long before its 1500 tokens are done."""
    before = aborted()
    body = client.body([5, 6, 7], 1500, True)
    with requests.post(f"{client.url}/generate", json=body, stream=True, timeout=60) as answer:
        assert answer.status_code == 200
        assert next(answer.iter_lines(chunk_size=1)).startswith(b"data: ")
    wait_until(lambda: aborted() == before + 1, 12)


def test_a_killed_engine_loses_no_request_that_had_not_started(client: Client) -> None:
    """SIGKILL under load: only streams that a client had begun to read may break."""
    victim = engine_processes()[0]
    with ThreadPoolExecutor(24) as pool:
        running = [pool.submit(client.stream, prompt, 120) for prompt in prompts(48, 4)]
        time.sleep(2)
        victim.kill()
        outcomes = [future.result() for future in running]
    broken = [outcome for outcome in outcomes if not outcome.finished]
    assert all(outcome.started for outcome in broken), broken
    assert len(broken) < len(outcomes), "the other engine went on"
    wait_until(lambda: healthy(client, 2), START_SECONDS)


def test_a_killed_replica_loses_no_request_that_had_not_started(client: Client) -> None:
    """The same for the actor that owns the engine; the engine dies with it."""
    victim = engine_processes()[0].parent()
    assert victim is not None and "ray::" in victim.name() + " ".join(victim.cmdline())
    with ThreadPoolExecutor(24) as pool:
        running = [pool.submit(client.stream, prompt, 120) for prompt in prompts(48, 5)]
        time.sleep(2)
        victim.kill()
        outcomes = [future.result() for future in running]
    broken = [outcome for outcome in outcomes if not outcome.finished]
    assert all(outcome.started for outcome in broken), broken
    wait_until(lambda: healthy(client, 2), START_SECONDS)


def test_sigterm_drains(client: Client) -> None:
    """Both engines are told to end: streams finish, new requests get 503, the processes exit."""
    seen = [threading.Event(), threading.Event()]
    processes = engine_processes()
    with ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(client.stream, prompt, 1500, event)
            for prompt, event in zip(prompts(2, 6), seen, strict=True)
        ]
        assert all(event.wait(60) for event in seen)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        time.sleep(1)
        refused = client.whole([5, 6, 7])
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        outcomes = [future.result() for future in running]
    assert all(outcome.finished and len(outcome.tokens) == 1500 for outcome in outcomes)
    _gone, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    wait_until(lambda: healthy(client, 2), START_SECONDS)
