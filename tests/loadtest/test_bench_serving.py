"""The same traffic from sglang.bench_serving: its figures and ours must agree to 10 %."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.engine.environment import server_environment
from tests.engine.models import ensure_model
from tests.engine.server import Server, ServerSpec, running

from .runs import dump, run, scenario

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAZY = {"lazy_layers": [1, 3, 5], "sink_tokens": 4, "recent_tokens": 60}
FLAGS = (
    *("--chunked-prefill-size", "512", "--max-running-requests", "16", "--context-length", "4096"),
    *("--max-total-tokens", "16000", "--mem-fraction-static", "0.3", "--incremental-streaming-output"),
)
INPUT, OUTPUT, CLIENTS, REQUESTS = 400, 40, 8, 64
COMPARED = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_e2e_latency_ms")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    spec = ServerSpec("bench-serving", partial(ensure_model, "llama"), LAZY, FLAGS)
    with running(spec, tmp_path_factory.mktemp("engine")) as server:
        yield server


def bench_serving(server: Server, folder: Path) -> dict[str, Any]:
    """One run of SGLang's own benchmark; its figures."""
    out = folder / "bench_serving.jsonl"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", server.url]
    command += ["--model", str(ensure_model("llama")), "--dataset-name", "random-ids", "--tokenize-prompt"]
    command += ["--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT)]
    command += ["--random-range-ratio", "1", "--num-prompts", str(REQUESTS), "--disable-tqdm"]
    command += ["--max-concurrency", str(CLIENTS), "--warmup-requests", "2", "--output-file", str(out)]
    done = subprocess.run(
        command,
        env=server_environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    return found


def test_figures_agree(server: Server, tmp_path: Path) -> None:
    data = scenario(
        load={"kind": "closed", "users": CLIENTS, "requests": REQUESTS, "warmup": 2},
        traffic={"input": INPUT, "output": OUTPUT},
    )
    ours, theirs = [], []
    # In turns, so that what else the machine does falls on both; one pair first, to warm everything up.
    for number in range(4):
        server.flush_cache()
        done = run(server.url, {**data, "seed": number}, tmp_path)
        assert done.code == 0, dump(done)
        ours.append(done.summary)
        server.flush_cache()
        theirs.append(bench_serving(server, tmp_path))
    assert {one["completed"] for one in theirs} == {REQUESTS}
    assert {one["total_output_tokens"] for one in theirs} == {REQUESTS * OUTPUT}
    for name in COMPARED:
        locust, reference = (statistics.median(one[name] for one in some[1:]) for some in (ours, theirs))
        print(f"{name}: {locust:.4g} by locust, {reference:.4g} by sglang.bench_serving")
        assert locust == pytest.approx(reference, rel=0.10), name
