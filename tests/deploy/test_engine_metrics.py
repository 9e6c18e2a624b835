"""A real engine on the CPU: its /metrics holds every metric, and the numbers of what it just did."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from lt_sglang.metrics.catalog import CATALOG, Scope
from tests.engine.models import ensure_model
from tests.engine.server import Server, ServerSpec, running
from tests.engine.server_flags import HICACHE

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAZY = {"lazy_layers": [1, 3, 5], "sink_tokens": 4, "recent_tokens": 60}
FLAGS = (
    *("--chunked-prefill-size", "256", "--max-running-requests", "8", "--context-length", "4096"),
    *("--max-total-tokens", "6400", "--mem-fraction-static", "0.3", "--enable-metrics"),
)
# Of the servers in dynamic mode.
DYNAMIC = {
    "mode": "dynamic",
    "keep": 3,
    "sink_tokens": 4,
    "recent_tokens": 60,
    "check_tables": True,
}
PROMPT_TOKENS, NEW_TOKENS, REQUESTS = 600, 16, 3
# K and V, 3 layers of either kind, 2 KV heads of 16, float32.
TOKEN_BYTES = 2 * 3 * 2 * 16 * 4


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = (*FLAGS, *HICACHE)
    spec = ServerSpec("metrics", partial(ensure_model, "llama"), LAZY, flags, tp=request.param)
    with running(spec, tmp_path_factory.mktemp("engine")) as server:
        yield server


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(server: Server) -> Samples:
    text = requests.get(f"{server.url}/metrics", timeout=10).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def values(samples: Samples, name: str, **labels: str) -> list[float]:
    wanted = set(labels.items())
    return [value for (found, pairs), value in samples.items() if found == name and wanted <= pairs]


def settled(server: Server) -> Samples:
    """The metrics of the idle engine: no slot used."""
    deadline = time.monotonic() + 20
    while True:
        samples = scrape(server)
        if values(samples, "lt_kv_slots", state="used") == [0] * 3 * server.spec.tp:
            return samples
        assert time.monotonic() < deadline, values(samples, "lt_kv_slots", state="used")
        time.sleep(0.5)


def test_every_metric_counts_what_was_done(server: Server) -> None:
    tp = server.spec.tp
    server.flush_cache()
    before = values(settled(server), "lt_requests_total", mode="static")
    rng = random.Random(1)
    for _ in range(REQUESTS):
        server.generate([rng.randrange(3, 512) for _ in range(PROMPT_TOKENS)], NEW_TOKENS)
    requests.get(f"{server.url}/health_generate", timeout=10).raise_for_status()
    samples = settled(server)

    for metric in CATALOG:
        if metric.help.startswith("Dynamic mode:"):
            continue
        ranks = {dict(pairs)["tp_rank"] for name, pairs in samples if name == metric.name}
        assert ranks == {str(rank) for rank in range(tp if metric.scope is Scope.RANK else 1)}, metric.name
        assert not any("pid" in dict(pairs) for name, pairs in samples if name == metric.name)

    assert values(samples, "lt_requests_total", mode="static") == [(before or [0])[0] + REQUESTS]
    assert values(samples, "lt_layer_lazy_requests_total", layer="3") == values(samples, "lt_requests_total")
    assert values(samples, "lt_layer_lazy_requests_total", layer="2") == []
    assert values(samples, "lt_layers", kind="lazy") == values(samples, "lt_layers", kind="full") == [3]
    capacity, free = (values(samples, f"lt_kv_{name}_bytes") for name in ("capacity", "free"))
    assert len(set(capacity)) == len(set(free)) == 1 and len(capacity) == len(free) == tp
    assert values(samples, "lt_retractions_total", cause="memory") == [0]
    assert values(samples, "lt_config_info", lazy_layers="1,3,5", recent_tokens="60") == [1]

    # The prefix cache holds every token but each last one, on every rank alike; one the health check's.
    cached = REQUESTS * (PROMPT_TOKENS + NEW_TOKENS - 1) + 1
    assert values(samples, "lt_kv_slots", kind="full", state="cached") == [cached] * tp
    streaming = values(samples, "lt_kv_slots", kind="streaming", state="cached")
    sinks = values(samples, "lt_kv_slots", kind="sink", state="cached")
    assert len(set(streaming)) == len(set(sinks)) == 1
    assert 0 < streaming[0] < cached / 2 and sinks[0] == 4 * REQUESTS
    held = sum(values(samples, "lt_kv_bytes", state="cached"))
    saved = sum(values(samples, "lt_kv_saved_bytes", state="cached"))
    assert held == TOKEN_BYTES * (cached + streaming[0] + sinks[0])
    assert held + saved == 2 * TOKEN_BYTES * cached, "full attention in all six layers"
    assert held == sum(capacity) - sum(free), "nothing is used"
