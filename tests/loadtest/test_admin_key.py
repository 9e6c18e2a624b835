"""The admin key that a server was started with reaches those who need it: /abort_request, /flush_cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import requests

from lt_sglang.bench.runner import run_scenario
from lt_sglang.bench.scenario_file import load_scenarios
from lt_sglang.launch.admin import KEY_VARIABLE
from lt_sglang.launch.engine import Engine, EngineSpec

from .runs import scenario, write
from .slow_server import Delays, serve

KEY = "sesame"


@pytest.mark.parametrize("key", [KEY, None])
def test_requests_are_aborted_with_the_key(
    key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    aborts = {"share": 1.0, "after_tokens": 2, "how": "abort_request"}
    load = {"kind": "closed", "users": 2, "requests": 4, "warmup": 0}
    (one,) = load_scenarios(write(tmp_path, scenario(load=load, aborts=aborts)))
    with serve(Delays(first=0.01, between=0.01, admin_key=KEY)) as url:
        found = run_scenario(one, url, tmp_path / "out", 120, key)
    assert found["summary"]["aborted"] == (4 if key else 0)
    if key is None:
        assert f"/abort_request asks for the server's admin key: set {KEY_VARIABLE}" in json.dumps(found)


def engine(folder: Path, stock: bool) -> Engine:
    """An engine whose command is worked out, and never started."""
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    own = ("--attention-backend=torch_native",) if stock else ("--lt-lazy-layers=1",)
    return Engine(EngineSpec("one", str(folder), (), own, stock), folder / "log")


@pytest.mark.parametrize(("stock", "has_key"), [(False, True), (True, False)])
def test_an_engine_is_flushed_with_its_own_key(
    stock: bool, has_key: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    made = engine(tmp_path, stock)
    command, env = made.spec.command(made.port)
    monkeypatch.setattr("lt_sglang.launch.server_process.spawn", lambda *_, **__: None)
    made._spawn(command, env)
    assert (made.admin_key is not None) == has_key
    assert made.admin_key is None or not any(made.admin_key in word for word in command)
    with serve(Delays(admin_key=made.admin_key)) as url:
        made.url = url
        made.flush()
        made.admin_key = "another"
        with pytest.raises(requests.HTTPError, match="401"):
            made.flush()
