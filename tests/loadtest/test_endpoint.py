"""locust against a real server on the CPU: 64 streams at once, no error, and the figures the server has."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.engine.models import ensure_model
from tests.engine.server import Server, ServerSpec, running

from .runs import dump, run, scenario

pytestmark = pytest.mark.engine

LAZY = {"lazy_layers": [1, 3, 5], "sink_tokens": 4, "recent_tokens": 60}
FLAGS = (
    *("--chunked-prefill-size", "1024", "--max-running-requests", "64", "--context-length", "4096"),
    *("--max-total-tokens", "24000", "--mem-fraction-static", "0.3", "--enable-metrics"),
)
STREAMS, REQUESTS = 64, 256


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("engine")
    template = folder / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    flags = (*FLAGS, "--chat-template", str(template))
    with running(ServerSpec("loadtest", partial(ensure_model, "llama"), LAZY, flags), folder) as server:
        yield server


def test_64_streams_without_an_error_and_metrics_agree(server: Server, tmp_path: Path) -> None:
    data = scenario(
        load={"kind": "closed", "users": STREAMS, "requests": REQUESTS, "warmup": 2},
        # Prefill takes most of the time, and all but the first 64 requests come one by one: what the server
        # does not count, the wait for its HTTP layer, is then small beside what it does.
        traffic={
            "input": {"uniform": {"low": 500, "high": 1300}},
            "output": {"uniform": {"low": 4, "high": 12}},
        },
    )
    done = run(server.url, data, tmp_path)
    assert done.code == 0, dump(done)
    got, counted = done.summary, done.data["server"]
    assert got["errors"] == 0 and got["completed"] == REQUESTS
    assert got["concurrency"] > STREAMS / 2, "they were not at once"
    # Counts to the token; times to 5 %.
    assert counted["requests"] == counted["ttft_count"] == REQUESTS
    assert counted["input_tokens"] == got["total_input_tokens"]
    assert counted["output_tokens"] == got["total_output_tokens"]
    assert counted["mean_ttft_ms"] == pytest.approx(got["mean_ttft_ms"], rel=0.05)
    assert counted["mean_e2e_ms"] == pytest.approx(got["mean_e2e_latency_ms"], rel=0.05)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_openai_endpoints(server: Server, api: str, tmp_path: Path) -> None:
    data = scenario(
        api=api,
        load={"kind": "closed", "users": 4, "requests": 8, "warmup": 1},
        traffic={"input": 100, "output": 12, "turns": 2 if api == "chat" else 1},
    )
    done = run(server.url, data, tmp_path)
    assert done.code == 0, dump(done)
    turns = 2 if api == "chat" else 1
    assert done.summary["completed"] == 8 * turns
    assert done.summary["total_output_tokens"] == 8 * turns * 12
    first = [int(row["input_tokens"]) for row in done.samples if row["turn"] == "0"]
    # Chat adds a template, and its text is made of numbers to give about so many tokens.
    assert all(length == pytest.approx(100, rel=0.3 if api == "chat" else 0.01) for length in first)


def test_aborted_streams_leave_the_server_as_it_was(server: Server, tmp_path: Path) -> None:
    data = scenario(
        load={"kind": "closed", "users": 16, "requests": 48, "warmup": 0},
        traffic={"input": 150, "output": 60},
        aborts={"share": 0.5, "after_tokens": 4, "how": "abort_request"},
    )
    done = run(server.url, data, tmp_path)
    assert done.code == 0, dump(done)
    assert done.summary["aborted"] >= 12 and done.summary["completed"] >= 12
    server.flush_cache()
    server.assert_healthy()
    memory = server.lighttransfer()["memory"]
    assert memory["sink_sets_used"] == memory["sink_requests"] == 0
