"""The warm-up runs what only long prompts run, before the server is ready, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lt_sglang.launch.warmup import BEYOND

from .server import running
from .specs import CHUNK, DYNAMIC, DYNAMIC_SERVERS

pytestmark = pytest.mark.engine


def test_warm_up(tmp_path: Path) -> None:
    """Two prompts are decided, one of them over several chunks; what follows on them finds their prefix."""
    spec = DYNAMIC_SERVERS[DYNAMIC].spec
    spec = replace(spec, name="warm-up", flags=(*spec.flags, "--warmups", "lighttransfer"))
    with running(spec, tmp_path) as server:
        log = server.log.read_text()
        window = 4 + 60
        lengths = [window + BEYOND, CHUNK + window + BEYOND]
        assert f"warm-up with prompts of {lengths} tokens" in log
        # Ready is logged later, and nobody else has asked for anything yet but the health check.
        assert log.index("warm-up with prompts") < log.index("Uvicorn running on")
        state = server.lighttransfer()
        assert state["layer_sets"]["decided"] == 2 and state["layer_sets"]["inherited"] == 2
        assert state["layer_sets"]["stored"] == 0, "the cache was emptied"
        assert state["pools"]["sink_sets_used"] == 0
