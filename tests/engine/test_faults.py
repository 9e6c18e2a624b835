"""Faults of machines, checkpoints and clients, and overload: each ends in a defined way, and others go on.

docs/reliability.md has a row for each.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests

from lt_sglang.launch.processes import kill_tree, spawn

from . import churn
from .environment import server_environment, write_plugin
from .models import FIRST_TOKEN, ensure_model
from .prompts import random_prompt
from .reference import Reference
from .server import Server, ServerFailed, events, running
from .specs import LAZY_SERVERS, REUSE, TENSOR_PARALLEL

pytestmark = pytest.mark.engine

# Of a server that must not start, or that loses a rank.
END_SECONDS = 240.0
# An embedding of it is not a number.
POISON = FIRST_TOKEN + 40
# Throughput afterwards, as a share of that before; the machine may be busy with other tests.
RECOVERED = 0.4

# A second plug-in, found first: where it is loaded in rank 1, ours cannot be loaded behind it.
ABSENT_IN_ONE_RANK = """\
import inspect, sys

frame = inspect.currentframe()
while frame is not None:
    if frame.f_code.co_name == "run_scheduler_process" and frame.f_locals.get("tp_rank") == 1:
        print("absent: in rank 1", flush=True)
        sys.modules["lt_sglang.plugin"] = None  # as if it were not installed there
    frame = frame.f_back

def register():
    pass
"""


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Of the shared server, made once."""
    lazy = LAZY_SERVERS[REUSE]
    return Reference(lazy.model(), lazy.layers, lazy.sinks, lazy.recent)


@pytest.fixture
def before(server: Server) -> Iterator[None]:
    """Slots, sink sets and processes are back at the end."""
    server.flush_cache()
    start = churn.state(server)
    yield
    churn.assert_state(server, start)


def check(server: Server, reference: Reference, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    """Ask, compare with the reference; tokens per second."""
    began = time.monotonic()
    replies = server.generate_all(prompts, new_tokens, clients=32)
    seconds = time.monotonic() - began
    reference.compare(prompts, [reply.tokens for reply in replies]).assert_equal()
    return len(prompts) * new_tokens / seconds


def some_prompts(seed: int, count: int = 24) -> list[list[int]]:
    """Of up to 300 tokens."""
    rng = random.Random(seed)
    return [random_prompt(rng.randint(1, 300), rng) for _ in range(count)]


@pytest.mark.served_by(REUSE)
def test_ten_times_more_requests_than_fit(server: Server, reference: Reference, before: None) -> None:
    """All are answered, in turn and right; nothing is refused, and throughput is then what it was."""
    speed = max(check(server, reference, some_prompts(seed), 32) for seed in (1, 2))
    room = server.room()
    rng = random.Random(3)
    flood = [random_prompt(rng.randint(200, 500), rng) for _ in range(160)]
    new_tokens = 8
    held = sum(map(len, flood)) + len(flood) * new_tokens
    assert held > 8 * room and len(flood) > 4 * 32, (held, room)
    with ThreadPoolExecutor(len(flood)) as pool:
        replies = list(pool.map(lambda prompt: server.generate(prompt, new_tokens), flood))
    assert {reply.finish for reply in replies} == {"length"}
    reference.compare(flood, [reply.tokens for reply in replies]).assert_equal()
    again = max(check(server, reference, some_prompts(seed), 32) for seed in (4, 5))
    assert again > RECOVERED * speed, (speed, again)


@pytest.mark.served_by(REUSE)
def test_a_request_that_can_never_fit(server: Server, reference: Reference, before: None) -> None:
    """400 and a sentence, at once, while others run and go on."""
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(check, server, reference, some_prompts(6), 32)
        for length, new_tokens in ((4090, 2000), (9000, 1)):
            parameters = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
            prompt = random_prompt(length, random.Random(length))
            answer = server.post("/generate", {"input_ids": prompt, "sampling_params": parameters})
            assert answer.status_code == 400, answer.text
            assert "context length" in answer.text and "Traceback" not in answer.text, answer.text
        others.result()


@pytest.mark.served_by(REUSE)
def test_clients_that_hang_up(server: Server, reference: Reference, before: None) -> None:
    """Their requests end, their slots come back, the others' answers are right."""
    rng = random.Random(7)

    def leave(chunks: int) -> None:
        stream = server.stream(random_prompt(rng.randint(1, 600), rng), 1500)
        for _ in zip(range(chunks), stream, strict=False):
            pass
        stream.close()

    with ThreadPoolExecutor(17) as pool:
        gone = [pool.submit(leave, number % 4) for number in range(16)]
        pool.submit(check, server, reference, some_prompts(8), 32).result()
        for one in gone:
            one.result()
    assert_idle_within(server, 60)


def assert_idle_within(server: Server, seconds: float) -> None:
    """No request runs any more: none goes on for a client that has left."""
    deadline = time.monotonic() + seconds
    while server.post("/flush_cache").status_code != 200:
        assert time.monotonic() < deadline, "requests of clients that left still run"
        time.sleep(0.5)


@pytest.mark.served_by(REUSE)
def test_clients_that_read_slowly(server: Server, reference: Reference, before: None) -> None:
    """They hold up nobody; what they read in the end is whole and right."""
    rng = random.Random(9)
    prompts = [random_prompt(rng.randint(1, 200), rng) for _ in range(8)]
    parameters = {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True}
    with ExitStack() as stack:
        answers = []
        for prompt in prompts:
            body = {"input_ids": prompt, "sampling_params": parameters, "stream": True}
            answers.append(stack.enter_context(server.post("/generate", body, stream=True)))
        check(server, reference, some_prompts(10), 32)  # while nobody reads
        outputs = []
        for answer in answers:
            outputs.append([event["output_ids"] for event in events(answer)][-1])
            time.sleep(0.2)
    assert [len(output) for output in outputs] == [300] * len(prompts)
    reference.compare(prompts, outputs).assert_equal()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared server's model, but for the embedding of POISON, which is not a number."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(ensure_model("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.served_by(REUSE)
def test_logits_that_are_not_numbers(
    server: Server, reference: Reference, poisoned: Path, before: None
) -> None:
    """They stay with the request that made them: its slots are used again, and those answers are right.

    A prompt with one bad token makes K and V that are not numbers in every layer behind it.
    """
    churn.update(server, churn.Update("poisoned", poisoned, True))
    try:
        rng = random.Random(11)
        bad = [[*random_prompt(rng.randint(0, 200), rng), POISON, *random_prompt(40, rng)] for _ in range(12)]
        good = [[token if token != POISON else 9 for token in prompt] for prompt in some_prompts(12, 24)]
        with ThreadPoolExecutor(1) as pool:
            ends = pool.submit(server.generate_all, bad, 24, clients=12)
            replies = server.generate_all(good, 32)
            for reply in ends.result():
                assert reply.finish in ("length", "abort")
        clean = [(p, r.tokens) for p, r in zip(good, replies, strict=True) if POISON not in r.tokens]
        assert len(clean) > len(good) / 2
        reference.compare(*zip(*clean, strict=True)).assert_equal()
        # Every slot of the pools has held something since.
        again = [[token if token != POISON else 9 for token in prompt] for prompt in some_prompts(13, 60)]
        outputs = [reply.tokens for reply in server.generate_all(again, 8)]
        clean = [(p, o) for p, o in zip(again, outputs, strict=True) if POISON not in o]
        reference.compare(*zip(*clean, strict=True)).assert_equal()
    finally:
        churn.update(server, churn.Update("default", ensure_model("llama"), True))
    check(server, reference, some_prompts(14), 16)


def _end_of_start(
    folder: Path, model: Callable[[], Path], tp: int = 1, path: str | None = None
) -> tuple[int | None, str, list[str]]:
    """Start a server that should not; its exit code (None: it ran on), log, and processes left."""
    spec = replace(LAZY_SERVERS[TENSOR_PARALLEL if tp > 1 else REUSE].spec, model=model)
    env = server_environment(tp=tp, extra=spec.env)
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([path, env["PYTHONPATH"]])
    log = folder / "log"
    process = spawn(Server(spec, log).command(), env, log)
    deadline = time.monotonic() + END_SECONDS
    members: dict[int, psutil.Process] = {}
    while process.poll() is None and time.monotonic() < deadline:
        for member in _children(process):
            members[member.pid] = member
        time.sleep(0.2)
    status = process.poll()
    time.sleep(2)
    left = [member.name() for member in members.values() if member.is_running() and not _zombie(member)]
    kill_tree(process)
    return status, log.read_text(encoding="utf-8", errors="replace"), left


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    """The start ends with an error that names the trouble; nothing is served, no process is left."""
    model = tmp_path / "model"
    shutil.copytree(ensure_model("llama"), model)
    weights = model / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    status, log, left = _end_of_start(tmp_path, lambda: model)
    assert status not in (None, 0), log[-3000:]
    assert "safetensor" in log.lower() and "The server is fired up" not in log, log[-3000:]
    assert not left, left


@pytest.mark.slow
def test_the_plugin_missing_in_one_rank(tmp_path: Path) -> None:
    """No rank serves: the one without it ends the start."""
    folder = write_plugin(tmp_path / "plugin", "absent", "absent:register")
    (folder / "absent.py").write_text(ABSENT_IN_ONE_RANK, encoding="utf-8")
    status, log, left = _end_of_start(tmp_path, partial(ensure_model, "qwen2"), tp=2, path=str(folder))
    assert status not in (None, 0), log[-3000:]
    assert "absent: in rank 1" in log and "Failed to load plugin lighttransfer" in log, log[-3000:]
    assert "The server is fired up" not in log, log[-3000:]
    assert not left, left


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(rank: int, tmp_path: Path) -> None:
    """Clients get an error instead of silence; the server ends, with a code and no process left behind."""
    spec = replace(LAZY_SERVERS[TENSOR_PARALLEL].spec, name="killed-rank")
    with running(spec, tmp_path) as server, ThreadPoolExecutor(4) as pool:
        members = server.processes()
        ranks = [process for process in members if "scheduler" in process.name()]
        assert len(ranks) == 2, [process.name() for process in members]
        rng = random.Random(15)
        asked = [pool.submit(server.generate, random_prompt(200, rng), 2000) for _ in range(4)]
        time.sleep(2)
        victim = next(process for process in ranks if f"TP{rank}" in " ".join(process.cmdline()))
        victim.kill()
        began = time.monotonic()
        while server.alive:
            assert time.monotonic() - began < END_SECONDS, server.log_tail()
            time.sleep(0.5)
        assert server.exit_code != 0
        for one in asked:
            error = one.exception(timeout=30)
            assert isinstance(error, (ServerFailed, requests.RequestException)), error
        time.sleep(2)
        left = [p.name() for p in members if p.is_running() and not _zombie(p)]
        assert not left, left
