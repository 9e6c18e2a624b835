"""The pinned gateway as the chart starts it, before stand-ins for engines: keys, and how it spreads."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median

import pytest
import requests

from .gateway_rig import CLIENT, OPERATOR, engines, gateway

pytestmark = pytest.mark.slow

ENGINES, PROMPTS = 4, 40
WITH_KEYS = ("engine.apiKeySecret.name=keys", "adminKeySecret.name=operators")
# What changes the gateway or shows how it is made up; the answers are those of sglang-router 0.3.2.
ADMIN = (
    ("GET", "/workers"),
    ("POST", "/workers"),
    ("DELETE", "/workers/some-id"),
    ("POST", "/flush_cache"),
    ("GET", "/get_loads"),
    ("GET", "/wasm"),
    ("POST", "/wasm"),
    ("GET", "/v1/tokenizers"),
    ("POST", "/v1/tokenizers"),
)


def status(url: str, method: str, route: str, key: str | None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"url": "http://127.0.0.1:9"}
    return requests.request(method, f"{url}{route}", json=body, headers=headers, timeout=10).status_code


def ask(url: str, rng: random.Random, key: str | None = None) -> int:
    text = "".join(chr(rng.randrange(97, 123)) for _ in range(300))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return requests.post(f"{url}/generate", json={"text": text}, headers=headers, timeout=30).status_code


def test_operators_alone_reach_the_admin_api(gateway_path: Path, tmp_path: Path) -> None:
    with engines(2) as urls, gateway(gateway_path, tmp_path, list(urls), *WITH_KEYS) as url:
        for method, route in ADMIN:
            assert status(url, method, route, None) == 401, route
            assert status(url, method, route, CLIENT) == 401, f"{route}: a client's key is no operator's"
            assert status(url, method, route, OPERATOR) not in (401, 403), route
        rng = random.Random(0)
        assert ask(url, rng, CLIENT) == 200 and ask(url, rng) == 401


def test_without_secrets_nobody_reaches_the_admin_api(gateway_path: Path, tmp_path: Path) -> None:
    """And everybody the model, which the chart allows inside a cluster only."""
    with engines(2) as urls, gateway(gateway_path, tmp_path, list(urls)) as url:
        for method, route in ADMIN:
            for key in (None, CLIENT, OPERATOR, ""):
                assert status(url, method, route, key) == 401, route
        assert ask(url, random.Random(0)) == 200


def test_unrelated_prompts_spread(gateway_path: Path, tmp_path: Path) -> None:
    """No engine gets more than 40 % of 40 unrelated prompts, one after another: median of 5 rounds."""
    with engines(ENGINES) as handlers, gateway(gateway_path, tmp_path, list(handlers)) as url:
        rng, most = random.Random(1), []
        for _ in range(5):
            before = {engine: handler.served for engine, handler in handlers.items()}
            assert {ask(url, rng) for _ in range(PROMPTS)} == {200}
            most.append(max(handler.served - before[engine] for engine, handler in handlers.items()))
    assert median(most) <= 0.4 * PROMPTS, most
