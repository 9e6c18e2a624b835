"""Hostile requests: no client route ends or parks the server, and admin routes need the admin key.

``FUZZ_EXAMPLES`` is how many requests are fuzzed, ``FUZZ_SEED`` where they begin; ``make fuzz-long`` sends
more.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import pytest
import requests

from tests.fuzz.bodies import Shot, each_shot, operations
from tests.fuzz.hostile import FAILS, Probe, corpus, outcome
from tests.fuzz.routes import admin_routes, all_routes, client_routes

from .server import REQUEST_TIMEOUT, Server, events
from .server_flags import ADMIN_KEY, CLIENT_KEY
from .specs import FUZZED, FUZZED_DYNAMIC

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
SEED = int(os.environ.get("FUZZ_SEED", "16"))
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
# The dynamic server has both keys, the static one the admin's alone.
KEYS = {FUZZED: {}, FUZZED_DYNAMIC: {"Authorization": f"Bearer {CLIENT_KEY}"}}
# Open to everybody by SGLang's design, for probes and Prometheus.
ALWAYS_OPEN = ("/health", "/ready", "/metrics")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.parametrize(
        "keys",
        [pytest.param(keys, marks=pytest.mark.served_by(name), id=name) for name, keys in KEYS.items()],
    ),
]


def call(server: Server, method: str, path: str, headers: dict[str, str]) -> requests.Response:
    """A request without a body."""
    return requests.request(method, server.url + filled(path), headers=headers, timeout=30)


def filled(path: str) -> str:
    """A route's path with its parameters filled in."""
    return re.sub(r"\{[^}]*\}", "x", path)


def test_admin_routes_need_the_admin_key(server: Server, keys: dict[str, str]) -> None:
    routes = admin_routes()
    assert len(routes) > 40, "SGLang's decorators are read from another place"
    for given in ({}, keys, {"Authorization": "Bearer nobody"}, {"Authorization": ADMIN_KEY}):
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(call, repeat(server), *zip(*routes, strict=True), repeat(given))
            codes = dict(zip(routes, (answer.status_code for answer in answers), strict=True))
        assert not {route: code for route, code in codes.items() if code not in (401, 403)}, given
    # What the middleware looks at is the path, whatever the Host header says.
    for host in ("x/health?", "x/health#", "/health"):
        assert call(server, "POST", "/flush_cache", {"Host": host}).status_code in (400, 401, 403)
    assert call(server, "POST", "/flush_cache", ADMIN).status_code == 200


def test_client_routes_need_no_admin_key(server: Server, keys: dict[str, str]) -> None:
    for method, path in client_routes():
        assert call(server, method, path, keys).status_code not in (401, 403), (method, path)
        if keys and not path.startswith(ALWAYS_OPEN):
            assert call(server, method, path, {}).status_code == 401, (method, path)


def test_every_route_of_the_server_is_known(server: Server, keys: dict[str, str]) -> None:
    known = {path.replace(":path}", "}") for _, path in all_routes()}
    assert set(openapi(server, keys)["paths"]) <= known


def test_no_key_is_shown_or_logged(server: Server, keys: dict[str, str]) -> None:
    shown = "".join(call(server, "GET", path, keys).text for path in ("/server_info", "/get_server_info"))
    assert "admin_api_key" in shown
    for text in (shown, server.log_text()):
        assert ADMIN_KEY not in text
        assert CLIENT_KEY not in text


def test_the_corpus(server: Server, keys: dict[str, str]) -> None:
    """Every hostile request that was ever found: refused as recorded, the one beside it answered as alone."""
    probe = Probe(server, keys)
    wrong = []
    for entry in corpus():
        answer = probe.send(entry.method, entry.route, entry.data, entry.headers)
        found = outcome(answer)
        allowed = {entry.expect} if entry.expect != "any" else {"refused", "answered"}
        if entry.route in FAILS:
            allowed.add("failed")
        if found not in allowed:
            wrong.append(
                f"{entry.name}: {found}, not {entry.expect}: {answer.status_code} {answer.text[:200]}"
            )
    assert not wrong, "\n".join(wrong)
    server.assert_healthy()


def test_fuzzed_requests(
    server: Server, keys: dict[str, str], record_property: pytest.RecordProperty
) -> None:
    """Bodies from SGLang's own OpenAPI, with one innocent request beside each."""
    probe = Probe(server, keys)
    clients = set(client_routes())
    api = openapi(server, keys)
    chosen = operations(
        api, lambda method, path: (method, path.replace("{model}", "{model:path}")) in clients
    )
    share = EXAMPLES / len(KEYS) / sum(weight for weight, _ in chosen)
    record_property("seed", SEED)
    print(f"FUZZ_EXAMPLES={EXAMPLES} FUZZ_SEED={SEED}")
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []

    def send(shot: Shot) -> None:
        answer = probe.send(shot.method, shot.route, shot.data, shot.headers)
        found = outcome(answer)
        outcomes[found] += 1
        if found == "failed" and shot.route not in FAILS:
            wrong.append(f"{shot}: {answer.status_code} {answer.text[:200]}")

    for index, (weight, operation) in enumerate(chosen):
        each_shot(api, operation, max(1, -int(-weight * share // 1)), SEED + index, send)
    print(f"{probe.sent} requests: {dict(outcomes)}")
    assert not wrong, "\n".join(wrong)
    assert probe.sent >= EXAMPLES / len(KEYS)
    assert outcomes["answered"] > probe.sent / 20, "hardly anything gets past the first check"
    server.assert_healthy()
    assert call(server, "POST", "/flush_cache?timeout=30", ADMIN).status_code == 200, "something is left"


def test_admin_routes_that_cannot_be_served_say_so(server: Server, keys: dict[str, str]) -> None:
    for action in ("start", "stop", "dump"):
        answer = requests.post(f"{server.url}/{action}_expert_distribution_record", headers=ADMIN, timeout=30)
        assert (answer.status_code, "expert" in answer.text) == (400, True), answer.text
    for action in ("release", "resume"):
        url = f"{server.url}/{action}_memory_occupation"
        answer = requests.post(url, json={}, headers=ADMIN, timeout=30)
        assert (answer.status_code, "--enable-memory-saver" in answer.text) == (400, True), answer.text
    server.assert_healthy()


def test_an_abort_ends_one_name(server: Server, keys: dict[str, str]) -> None:
    """Running and waiting: eight run, the others wait."""
    rng = random.Random(SEED)

    def ask(rid: str, prompts: int = 1, n: int = 1, tokens: int = 700) -> list[str]:
        ids: Any = [[rng.randrange(5, 500) for _ in range(20)] for _ in range(prompts)]
        params = {"temperature": float(n > 1), "max_new_tokens": tokens, "ignore_eos": True, "n": n}
        body = {"input_ids": ids if prompts > 1 else ids[0], "rid": rid, "sampling_params": params}
        answer = requests.post(f"{server.url}/generate", json=body, headers=keys, timeout=120)
        parts = answer.json() if isinstance(answer.json(), list) else [answer.json()]
        # One that is aborted before it runs is an error to its client.
        return [
            part["meta_info"]["finish_reason"]["type"] if "meta_info" in part else "abort" for part in parts
        ]

    with ThreadPoolExecutor(16) as pool:
        running = {
            "r1": pool.submit(ask, "r1"),
            "r1_retry": pool.submit(ask, "r1_retry"),
            "batch": pool.submit(ask, "batch", 2),
            "batch_x": pool.submit(ask, "batch_x"),
            "many": pool.submit(ask, "many", 1, 3),
        }
        time.sleep(1.0)
        # The one that is aborted asks for more, so that it has not ended by then even if it runs already.
        asked = {"w1": 700, "w10": 20, "w1_0": 20, "w1_retry": 20}
        waiting = {name: pool.submit(ask, name, 1, 1, tokens) for name, tokens in asked.items()}
        time.sleep(0.5)
        for rid in ("w1", "r1", "batch", "many"):
            body = {"rid": rid}
            assert requests.post(f"{server.url}/abort_request", json=body, headers=ADMIN, timeout=30).ok
        ended = {name: set(future.result()) for name, future in (running | waiting).items()}
    assert {name for name, how in ended.items() if how == {"abort"}} == {"w1", "r1", "batch", "many"}, ended
    assert all(how in ({"abort"}, {"length"}) for how in ended.values()), ended


def test_a_session_survives_names_used_twice(server: Server, keys: dict[str, str]) -> None:
    def post(path: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(server.url + path, json=body, headers=keys, timeout=30)

    def ask(own: str, **session: Any) -> int:
        params = {"max_new_tokens": 2, "temperature": 0}
        body = {"input_ids": [7, 8, 9], "rid": own, "session_params": {"id": name, **session}}
        return post("/generate", {**body, "sampling_params": params}).status_code

    name = post("/open_session", {"capacity_of_str_len": 1000}).json()
    assert ask("a") == 200
    assert ask("b", rid="a") == 200
    assert ask("b", rid="a") == 200
    assert ask("c", rid="a", replace=True) == 200
    assert ask("d", replace=True) == 400
    assert post("/close_session", {"session_id": name}).status_code == 200
    server.assert_healthy()


def test_a_session_of_odd_requests(server: Server, keys: dict[str, str]) -> None:
    """Offsets of any size, and a session that ends while its requests run and wait."""

    def post(path: str, body: dict[str, Any], **options: Any) -> requests.Response:
        return requests.post(server.url + path, json=body, headers=keys, timeout=REQUEST_TIMEOUT, **options)

    def body(own: str, tokens: int, **session: Any) -> dict[str, Any]:
        params = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        named = {"id": name, **session}
        return {"input_ids": [7, 8, 9], "rid": own, "session_params": named, "sampling_params": params}

    def ask(own: str, tokens: int = 2, **session: Any) -> int:
        return post("/generate", body(own, tokens, **session)).status_code

    name = post("/open_session", {"capacity_of_str_len": 1000}).json()
    assert ask("first") == 200
    for number, offset in enumerate((-1, -(10**6), 0, 10**6, 2**62, -(2**63))):
        assert ask(f"offset-{number}", rid="first", offset=offset) == 200, offset
        assert ask(f"without-{number}", rid="first", offset=offset, drop_previous_output=True) == 200, offset
    assert ask("nobody", rid="nobody") == 400
    with (
        ThreadPoolExecutor(12) as pool,
        post("/generate", {**body("long", 700), "stream": True}, stream=True) as stream,
    ):
        answers = events(stream)
        next(answers)
        asked = [pool.submit(ask, f"beside-{number}", 50) for number in range(12)]
        assert post("/close_session", {"session_id": name}).status_code == 200
        # Those that came before belong to nobody now, and go on to their end.
        *_, last = answers
        assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 700}
        assert {request.result() for request in asked} <= {200, 400}
    assert ask("late") == 400
    server.assert_healthy()
    assert call(server, "POST", "/flush_cache?timeout=30", ADMIN).status_code == 200, "something is left"


def test_realtime_needs_a_speech_model(server: Server, keys: dict[str, str]) -> None:
    """A websocket that SGLang's check of keys does not see; what is sent to it is read by nobody."""
    upgrade = {
        "Host": "a",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    lines = ["GET /v1/realtime HTTP/1.1", *(f"{name}: {value}" for name, value in upgrade.items())]
    for sent in (b"", b"\x81\x80\0\0\0\0", b"\x82\xff" + b"\xff" * 8 + b"\0" * 2**16, b"nonsense"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + sent)
            stream = connection.makefile("rb")
            assert stream.readline().split()[1] == b"101"
            while stream.readline().strip():
                pass
            # A text frame of 126 to 65,535 bytes.
            assert stream.read(2) == b"\x81\x7e"
            error = json.loads(stream.read(int.from_bytes(stream.read(2), "big")))
            assert error["error"]["code"] == "not_supported", error
    server.assert_healthy()


def openapi(server: Server, keys: dict[str, str]) -> dict[str, Any]:
    """SGLang's own description of its routes."""
    answer = call(server, "GET", "/openapi.json", keys)
    answer.raise_for_status()
    schema: dict[str, Any] = answer.json()
    return schema
