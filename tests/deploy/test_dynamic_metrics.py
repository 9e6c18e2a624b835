"""A real engine in dynamic mode on two ranks: what /metrics says of decisions, and of ranks that differ."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import requests

from lt_sglang.metrics import LAST_SCRAPES_SECONDS
from tests.engine.environment import server_environment, write_plugin
from tests.engine.models import ensure_model
from tests.engine.server import Server, ServerFailed, ServerSpec, running

from .test_engine_metrics import DYNAMIC, FLAGS, scrape, settled, values

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# A second plug-in: once a file is there, the second rank takes its layers in the opposite order.
SABOTEUR = """\
from pathlib import Path

def register():
    from lt_sglang.identify.state import DynamicState
    from sglang.srt.runtime_context import get_parallel

    check = DynamicState._check_tables

    def differ_and_check(self, sets):
        if Path({flag!r}).exists() and get_parallel().attn_tp_rank == 1:
            self.sets.bank_of[sets[0]] = self.sets.bank_of[sets[0]].flip(0)
        check(self, sets)

    DynamicState._check_tables = differ_and_check
"""


@dataclass(frozen=True)
class Sabotaged:
    """A server whose ranks agree until ``flag`` exists."""

    server: Server
    flag: Path


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sabotaged]:
    folder = tmp_path_factory.mktemp("plugin")
    flag = folder / "differ"
    write_plugin(folder, "saboteur", "saboteur:register")
    (folder / "saboteur.py").write_text(SABOTEUR.format(flag=str(flag)), encoding="utf-8")
    path = os.pathsep.join([str(folder), server_environment(tp=2)["PYTHONPATH"]])
    env = {"PYTHONPATH": path, "SGLANG_NCCL_SO_PATH": ""}
    spec = ServerSpec("differ", partial(ensure_model, "llama"), DYNAMIC, FLAGS, env=env, tp=2)
    with running(spec, tmp_path_factory.mktemp("engine")) as server:
        yield Sabotaged(server, flag)


def test_decisions_are_counted_once_an_engine(engine: Sabotaged) -> None:
    server, rng = engine.server, random.Random(3)
    long = [[rng.randrange(3, 512) for _ in range(600)] for _ in range(3)]
    for prompt in (*long, long[0] + long[1][:8], long[0][:40]):
        server.generate(prompt, 16)
    samples = settled(server)
    events = {
        event: values(samples, "lt_layer_sets_total", event=event) for event in ("decided", "inherited")
    }
    assert events == {"decided": [3], "inherited": [1]}
    assert values(samples, "lt_layer_sets_total", event="short") == [1], "health checks are not counted"
    assert values(samples, "lt_requests_total", mode="dynamic") == [5]
    assert values(samples, "lt_scored_requests_total") == [4]
    lazy = [sum(values(samples, "lt_layer_lazy_requests_total", layer=str(layer))) for layer in range(6)]
    assert sum(lazy) == 5 * 3 and max(lazy) <= 5
    (seconds,) = values(samples, "lt_identification_seconds_total")
    assert 0 < seconds < 10
    assert values(samples, "lt_table_checks_total", result="same") == [3]
    assert values(samples, "lt_table_checks_total", result="different") == [0]
    server.generate(long[0], 16)
    assert values(settled(server), "lt_identification_seconds_total") == [seconds], "nothing was found anew"


def test_different_ranks_are_shown_before_the_engine_stops(engine: Sabotaged) -> None:
    """Last in this file: the engine stops, and has not answered."""
    server, rng = engine.server, random.Random(4)
    engine.flag.touch()
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(server.generate([rng.randrange(3, 512) for _ in range(600)], 16))
        except (ServerFailed, requests.RequestException) as failure:
            answers.append(failure)

    began = time.monotonic()
    client = threading.Thread(target=ask)
    client.start()
    while values(scrape(server), "lt_table_checks_total", result="different") != [1]:
        assert time.monotonic() - began < 20, "not shown"
        time.sleep(0.5)
    while server.alive:
        # Of which SGLang waits 60 s for dumps of a GPU.
        assert time.monotonic() - began < LAST_SCRAPES_SECONDS + 120, "goes on"
        time.sleep(0.5)
    assert time.monotonic() - began > LAST_SCRAPES_SECONDS
    client.join(30)
    assert len(answers) == 1 and not hasattr(answers[0], "tokens")
    log = server.log_text()
    assert "this engine serves nothing any more" in log
    assert "check_tables: the ranks put layer 0 of a request into different banks" in log
