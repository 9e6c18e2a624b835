"""lt_sglang.guard.bodies and texts: what is refused before a route reads it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from lt_sglang import guard
from lt_sglang.guard import bodies, hooks, requests
from lt_sglang.guard.bodies import MIB, MOST_CHARACTERS, BodyGate
from lt_sglang.guard.texts import CHARACTERS_A_TOKEN, PIECE, Reader

from .test_guard import requested


class Served:
    """What the gate asks, and the bodies that got past it."""

    def __init__(self) -> None:
        self.context_length = 4096
        self.takes_templates = False
        self.bodies: list[bytes] = []


@pytest.fixture
def served() -> Served:
    return Served()


@pytest.fixture
def client(served: Served) -> Iterator[TestClient]:
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def echo(path: str, request: Request) -> dict[str, Any]:
        served.bodies.append(await request.body())
        return {"disconnected": await request.is_disconnected()}

    app.add_middleware(
        BodyGate,
        context_length=lambda: served.context_length,
        takes_templates=lambda: served.takes_templates,
        is_admins=lambda scope: scope["path"].startswith("/admin"),
    )
    with TestClient(app) as made:
        yield made


@pytest.mark.parametrize("body", [b"", b"{}", b"x" * MOST_CHARACTERS, b"\xff\0", b'{"a": "\\u00e9"}'])
def test_a_body_gets_past_as_it_is(client: TestClient, served: Served, body: bytes) -> None:
    assert client.post("/generate", content=body).status_code == 200
    assert client.get("/health").status_code == 200
    assert served.bodies == [body, b""]


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_body_that_is_too_large(
    client: TestClient, served: Served, monkeypatch: pytest.MonkeyPatch, in_pieces: bool
) -> None:
    """In pieces a client does not say how many there will be."""
    monkeypatch.setenv(bodies.MOST_VARIABLE, "1")
    for length, status in ((MIB, 200), (MIB + 1, 413)):
        body = b" " * length
        content: Any = (part for part in (body[:1000], body[1000:])) if in_pieces else body
        answer = client.post("/generate", content=content)
        assert answer.status_code == status
    assert "1 MiB" in answer.json()["error"]["message"]
    assert client.post("/admin", content=b" " * (2 * MIB)).status_code == 200
    assert [len(body) for body in served.bodies] == [MIB, 2 * MIB]
    monkeypatch.setenv(guard.SWITCH, "off")
    assert client.post("/generate", content=b" " * (2 * MIB)).status_code == 200


@pytest.mark.parametrize(("given", "most"), [("", 64), ("5", 5), ("0", 64), ("-1", 64), ("x", 64), ("٥", 64)])
def test_the_most_that_a_body_may_have(monkeypatch: pytest.MonkeyPatch, given: str, most: int) -> None:
    monkeypatch.setenv(bodies.MOST_VARIABLE, given)
    assert bodies.most_mib() == most


def written(text: str) -> list[bytes]:
    """A JSON text as a client may write it."""
    escaped = text.replace("chat_template", "chat\\u005ftemplate").replace("kwargs", "kw\\u0061rgs")
    return [
        text.encode(),
        escaped.encode(),
        *(text.encode(name) for name in ("utf-16", "utf-16-be", "utf-32")),
    ]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/decisions", "/v1/chat/completions"])
def test_a_template_of_a_clients_is_refused(client: TestClient, served: Served, path: str) -> None:
    own = json.dumps({"input": "a", "chat_template_kwargs": {"chat_template": "{{ 1 }}"}})
    twice = '{"chat_template_kwargs": {}, "chat_template_kwargs": {"chat_template": ""}}'
    for body in written(own) + written(twice):
        assert json.loads(body), "the body of this test is JSON"
        answer = client.post(path, content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("chat_template_kwargs.chat_template:")
    for name in bodies.NOT_KWARGS:
        answer = client.post(path, json={"chat_template_kwargs": {"a": 1, name: None}})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(f"chat_template_kwargs.{name}:")
    assert not served.bodies
    served.takes_templates = True
    assert client.post(path, content=own).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": None},
        {"input": "what is a chat_template?"},
        ["chat_template_kwargs", "chat_template"],
    ],
)
def test_what_only_speaks_of_templates_passes(client: TestClient, body: Any) -> None:
    for text in written(json.dumps(body)):
        assert client.post("/v1/responses", content=text).status_code == 200
    # No JSON, and too deep for Python: the route says so.
    for text in (b'"chat_template', b"[" * 200_000 + b'"chat_template"'):
        assert client.post("/v1/responses", content=text).status_code == 200


@pytest.mark.parametrize(
    ("path", "context", "most"),
    [
        ("/v1/responses", 10, 1000),
        ("/v1/chat/completions", 500, 4000),
        ("/v1/completions", 10, 8000),
        ("/generate", 2000, 16_000),
    ],
)
def test_more_text_than_the_context_can_hold(
    client: TestClient, served: Served, monkeypatch: pytest.MonkeyPatch, path: str, context: int, most: int
) -> None:
    monkeypatch.setattr(bodies, "MOST_CHARACTERS", 1000)
    monkeypatch.setattr(bodies, "MOST_CHARACTERS_OF_BATCH", 8000)
    served.context_length = context
    for more, status in ((0, 200), (1, 400)):
        # The names, "a" and "n", are text, too.
        value = {"a": "x" * (most - 2 + more), "n": []}
        answer = client.post(path, content=json.dumps(value))
        assert answer.status_code == status, answer.text
    assert f"{most + 1} characters of text; at most {most}" in answer.json()["error"]["message"]
    # Blanks are not tokenized, nor are the ids of a batch.
    status = 200 if path in bodies.BATCHES else 400
    assert client.post(path, content=json.dumps({"n": [1] * (most + 1)})).status_code == status
    assert client.post(path, content=json.dumps({"n": [1] * 9}) + " " * most).status_code == 200


@pytest.mark.parametrize("path", bodies.WRITTEN_OUT)
@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_what_a_route_writes_out_for_every_item(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, kind: str
) -> None:
    """A query of 8 MB and 4,000 items of a letter are 32 GB."""
    monkeypatch.setattr(bodies, "MOST_CHARACTERS_OF_BATCH", MOST_CHARACTERS)
    first, entries = bodies.WRITTEN_OUT[path]
    query: Any = "x" * 2048 if kind == "text" else [5] * 2048
    answer = client.post(path, json={first: query, entries: ["a"] * 512})
    assert answer.status_code == 200
    answer = client.post(path, json={first: query, entries: ["a"] * 513})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{entries}: with {first} in front of each")
    for body in ({first: query}, {entries: ["a"]}, {first: None, entries: "a"}, [], None):
        assert client.post(path, json=body).status_code == 200


def test_text_is_counted_wherever_it_is() -> None:
    value = {"ab": ["c", {"d": "ef"}, 5, None, True], "": "g"}
    assert (bodies.text_length(value, tokens=False), bodies.text_length(value)) == (7, 9)
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert bodies.text_length(deep) == 1


def nested(count: int, leaf: str = "1") -> str:
    """A JSON text of so many lists and objects in each other."""
    return '[{"a": ' * (count // 2) + "[" * (count % 2) + leaf + "]" * (count % 2) + "}]" * (count // 2)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/v1/tokenize"])
def test_lists_in_lists(client: TestClient, path: str) -> None:
    most = bodies.MOST_LEVELS
    many = json.dumps([[1]] * 1000 + ["[" * 1000])
    for body, status in (
        (nested(most), 200),
        (nested(most + 1), 400),
        (nested(most, leaf='"[[{{"'), 200),
        # Beside each other, and in a string.
        (many, 200),
        (nested(most // 2, leaf=many), 200),
    ):
        for text in written(body):
            answer = client.post(path, content=text)
            assert answer.status_code == status, body[:50]
            assert status == 200 or f"more than {most} lists" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("value", "found"), [(1, 0), ("a", 0), ([], 1), ({"a": 1}, 1), ([1, {"a": [2]}, [3]], 3), ([[[[]]]], 4)]
)
def test_levels(value: Any, found: int) -> None:
    assert bodies.levels(value) == found


def test_a_client_that_hangs_up_in_the_middle() -> None:
    """The route hears of it, and nothing is refused."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive(), await receive()])

    messages = iter(
        [
            {"type": "http.request", "body": b"a", "more_body": True},
            {"type": "http.disconnect"},
            {"type": "later"},
        ]
    )

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    gate = BodyGate(app, lambda: 1, lambda: False, lambda scope: False)
    scope = {"type": "http", "path": "/generate", "headers": [(b"transfer-encoding", b"chunked")]}
    asyncio.run(gate(scope, receive, send))
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect", "later"]


class Tokenizer:
    """A token for every four characters, one of its own at the beginning; counts what it reads."""

    def __init__(self) -> None:
        self.read = 0

    def encode(self, text: str) -> list[int]:
        self.read += len(text)
        return [1, *range(len(text) // 4)]


def test_a_text_that_cannot_fit_is_read_only_so_far() -> None:
    tokenizer = Tokenizer()
    most = 20_000
    reader = Reader(tokenizer, most)
    reader.check("text", "x" * (CHARACTERS_A_TOKEN * most))
    assert tokenizer.read == 0, "SGLang tokenizes it, and says how many tokens it has"
    with pytest.raises(ValueError, match=r"^text: 10000000 characters are more than 20000 tokens"):
        reader.check("text", "x" * 10_000_000)
    assert tokenizer.read == 2 * PIECE
    for other in (Reader(None, most), Reader(tokenizer, most, truncates=True)):
        other.check("text", "x" * 10_000_000)
    assert tokenizer.read == 2 * PIECE


def test_a_long_text_that_fits_is_not_refused() -> None:
    """Of few tokens, each of them long."""
    few = SimpleNamespace(encode=lambda text: [1] * (len(text) // 100 + 2))
    Reader(few, 1000).check("text", "x" * 99_000)
    with pytest.raises(ValueError, match=r"^text:"):
        Reader(few, 1000).check("text", "x" * 300_000)


def from_client(obj: Any, request: Any = "request", **manager: Any) -> Any:
    """A request that came over HTTP, checked and normalized; request: None for one of the process itself."""
    given = {"tokenizer": Tokenizer(), "context_len": 100, "allow_auto_truncate": False, **manager}
    hooks.generate_request(lambda *a: None, SimpleNamespace(server_args=requested(), **given), obj, request)
    stock = type(obj).normalize_batch_and_arguments
    hooks.normalize_request(getattr(stock, "__wrapped__", stock), obj)
    return obj


@pytest.mark.parametrize("kind", [GenerateReqInput, EmbeddingReqInput])
@pytest.mark.parametrize(
    ("name", "most", "more"),
    [
        ("input_ids", [[1]] * requests.MOST_PROMPTS, [[1]]),
        ("text", ["a"] * requests.MOST_PROMPTS, ["a"]),
        ("text", "a" * 800, "a" * 200_000),
        ("text", ["a", "a" * 800], ["a" * 200_000]),
    ],
)
def test_what_one_client_may_ask_for_at_once(kind: Any, name: str, most: Any, more: Any) -> None:
    from_client(kind(**{name: most}))
    with pytest.raises(ValueError, match=rf"^{name}: \d+ (prompts|characters)"):
        from_client(kind(**{name: most + more}))
    # A program that holds the engine has it to itself.
    from_client(kind(**{name: most + more}), request=None)


def test_the_switch_lets_all_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(guard.SWITCH, "off")
    assert not hasattr(from_client(GenerateReqInput(text="a" * 200_000)), "lt_reader")
