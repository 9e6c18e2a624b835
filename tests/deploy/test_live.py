"""A real engine in dynamic mode and a real Prometheus: every panel shows something, and an alert fires."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.engine.models import ensure_model
from tests.engine.server import Server, ServerSpec, running
from tests.engine.server_flags import HICACHE, RETRACT

from .live import Prometheus, as_grafana
from .test_engine_metrics import DYNAMIC, FLAGS
from .test_monitoring import ON_A_GPU, PANELS, SGLANG, names

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def quick(rules: str) -> str:
    """The rules with waits of seconds instead of minutes."""
    return re.sub(r"for: \d+m", "for: 3s", rules)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # SGLang's own test switch makes it retract requests, whose count is not shown before there is one.
    flags = (*FLAGS, *HICACHE)
    spec = ServerSpec("live", partial(ensure_model, "llama"), DYNAMIC, flags, env=RETRACT)
    with running(spec, tmp_path_factory.mktemp("engine")) as server:
        yield server


@pytest.fixture(scope="module")
def watched(
    engine: Server, prometheus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    watcher = Prometheus(prometheus, folder, [engine.url.removeprefix("http://")], quick)
    watcher.launch()
    try:
        watcher.wait_for(lambda: watcher.query('up{job="lt-sglang"} == 1'))
        yield watcher
    finally:
        watcher.stop()


def test_every_panel_has_data(engine: Server, watched: Prometheus) -> None:
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 512) for _ in range(600)] for _ in range(4)]
    expressions = {
        target["expr"]: panel["title"]
        for panel in PANELS
        for target in panel["targets"]
        if not ON_A_GPU & names(target["expr"])
    }
    empty: dict[str, str] = {}

    def all_shown() -> bool:
        engine.generate_all(prompts, 100)
        list(engine.stream(prompts[0], 24))
        found = {expression: watched.query(as_grafana(expression)) for expression in expressions}
        empty.clear()
        empty.update({expressions[expression]: expression for expression, data in found.items() if not data})
        return not empty

    try:
        watched.wait_for(all_shown)
    except AssertionError:
        pytest.fail(f"these panels stay empty: {empty}")
    assert [name for name in SGLANG if not watched.query(name)] == [], "this SGLang calls them otherwise"
    assert not watched.query('{__name__=~"sglang:.+"}'), "one form of names"


def test_a_dead_engine_is_an_alert(engine: Server, watched: Prometheus) -> None:
    """Last in this file: the engine does not come back."""
    assert "LtSglangDown" not in watched.firing()
    assert "LtSglangMetricsMissing" not in watched.firing()
    engine.stop()
    down = watched.wait_for(lambda: watched.firing().get("LtSglangDown"))
    assert down["instance"] == engine.url.removeprefix("http://") and down["severity"] == "critical"
