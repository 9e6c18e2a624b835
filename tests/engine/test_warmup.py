"""The warm-ups, SGLang's and ours, run before the server is ready; no client ends them; nothing is left."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from lt_sglang.launch.gate import MESSAGE
from lt_sglang.launch.warmup import BEYOND, decided_together

from .prompts import random_prompt
from .server import Server
from .server_flags import CHUNK
from .specs import DYNAMIC, DYNAMIC_SERVERS

pytestmark = pytest.mark.engine


# What clients send to a server that is starting: long prompts, and what would end or hold up a warm-up.
HOSTILE = (
    (
        "/generate",
        {"input_ids": random_prompt(2900, random.Random(1)), "sampling_params": {"max_new_tokens": 64}},
    ),
    ("/v1/completions", {"model": "x", "prompt": random_prompt(2900, random.Random(2)), "max_tokens": 64}),
    ("/abort_request", {"rid": "", "abort_all": True}),
)


class Clients:
    """They ask without pause, from before the port is open until the server is ready.

    seen: (path, status) of every answer that came before /ready said 200. wrong: answers that should not be.
    late: requests that came just after it.
    """

    def __init__(self, server: Server) -> None:
        self.seen: Counter[tuple[str, int]] = Counter()
        self.wrong: list[str] = []
        self.late = 0
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=item, daemon=True) for item in HOSTILE]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a request was never answered"

    def ready(self) -> bool:
        """Whether the server says so."""
        try:
            return requests.get(f"{self._server.url}/ready", timeout=10).status_code == 200
        except requests.RequestException:
            return False

    def _ask(self, path: str, body: dict[str, object]) -> None:
        while not self._stop.is_set():
            if self.ready():
                return
            try:
                answer = requests.post(f"{self._server.url}{path}", json=body, timeout=60)
            except requests.ConnectionError:
                time.sleep(0.05)
                continue
            if answer.status_code == 503:
                self.seen[path, 503] += 1
                if answer.json()["error"]["message"] != MESSAGE or "Retry-After" not in answer.headers:
                    self.wrong.append(f"{path}: {answer.text}")
            elif self.ready():
                self.late += 1
            else:
                self.wrong.append(f"{path}: {answer.status_code} before the server was ready")
            time.sleep(0.02)


def test_warm_up(tmp_path: Path) -> None:
    """Two prompts are decided, one of them over several chunks; what follows on them finds their prefix.

    Clients ask all the while, and are told to come back.
    """
    spec = DYNAMIC_SERVERS[DYNAMIC].spec
    spec = replace(spec, name="warm-up", warm_up=True, flags=(*spec.flags, "--warmups", "lighttransfer"))
    server = Server(spec, tmp_path / "log")
    server.launch()
    try:
        with Clients(server) as clients:
            while not clients.ready():
                assert server.alive, server.log_tail()
                time.sleep(0.05)
        assert not clients.wrong, clients.wrong[:5]
        assert {path for path, _ in clients.seen} == {path for path, _ in HOSTILE}, clients.seen
        server.assert_healthy()
        log = server.log.read_text()
        window = 4 + 60
        lengths = [window + BEYOND, CHUNK + window + BEYOND]
        # One at a time; then two and four in a chunk, behind a long one each.
        together = decided_together(window, CHUNK)
        assert f"warm-up with prompts of {lengths} tokens, up to {max(together, default=1)} together" in log
        # Ready is logged later, and nobody else was answered but SGLang's own warm-up, a short prompt.
        assert log.index("warm-up with prompts") < log.index("Uvicorn running on")
        state = server.lighttransfer()
        sets = state["layer_sets"]
        decided = 2 + sum(1 + count for count in together)
        assert (
            decided <= sets["decided"] <= decided + clients.late
            and sets["inherited"] == 2
            and sets["short"] == 1
        )
        assert sets["stored"] <= clients.late, "the cache was emptied"
        assert state["memory"]["sink_sets_used"] <= clients.late
        assert len(server.generate(HOSTILE[0][1]["input_ids"], 4).tokens) == 4  # type: ignore[arg-type]
    finally:
        server.stop()
