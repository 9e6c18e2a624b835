"""loadtest.experiments.commits: what it measures of a server, in which order, and what it refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from loadtest.experiments import commits
from lt_sglang.errors import LightTransferError

from ..http_server import serving

FIRST, BETWEEN = 0.1, 0.02


@contextmanager
def server(seen: list[Any], finish: dict[str, Any] | None = None, error: str = "") -> Iterator[str]:
    """Streams a batch as SGLang's /generate does: a token of each prompt, then the next of each."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.server.server_port, body["input_ids"]))  # type: ignore[attr-defined]
            self.send_response(200)
            self.end_headers()
            tokens = body["sampling_params"]["max_new_tokens"]
            time.sleep(FIRST)
            for count in range(1, tokens + 1):
                ended = (finish or {"type": "length"}) if count == tokens else None
                for index in range(len(body["input_ids"])):
                    meta = {"completion_tokens": count, "finish_reason": ended}
                    self.event(
                        {"error": {"message": error}} if error else {"index": index, "meta_info": meta}
                    )
                time.sleep(BETWEEN)
            self.wfile.write(b"data: [DONE]\n\n")

        def event(self, data: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

        def log_message(self, *args: object) -> None:
            """Nothing."""

    with serving(Handler) as url:
        yield url


def test_prefill_ends_with_the_last_first_token_and_decode_is_from_there() -> None:
    seen: list[Any] = []
    with server(seen) as url:
        row = commits.run(url, [[1, 2], [3], [4]], 11)
    assert [ids for _, ids in seen] == [[[1, 2], [3], [4]]]
    assert FIRST <= row["prefill_seconds"] < FIRST + 1
    # 3 prompts, a token in BETWEEN seconds at best; the client reads 512 bytes at a time.
    assert 0.2 * 3 / BETWEEN < row["decode_tokens_per_second"] <= 1.3 * 3 / BETWEEN


@pytest.mark.parametrize(
    ("given", "message"),
    [({"error": "out of memory"}, "out of memory"), ({"finish": {"type": "abort"}}, "ended early: .*abort")],
)
def test_an_answer_that_is_missing_ends_it(given: dict[str, Any], message: str) -> None:
    with server([], **given) as url, pytest.raises(LightTransferError, match=message):
        commits.run(url, [[1], [2]], 3)


def test_servers_take_turns_with_the_same_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first round is not counted; the file has what each of the others gave, and ratios to the first."""
    flags: dict[str, Any] = {}
    seen: list[Any] = []
    model, out = tmp_path / "model", tmp_path / "out.json"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 50}')
    with server(seen) as one, server(seen) as two:
        urls = {"a": one, "b": two}

        def start(tree: commits.Tree, given: list[str]) -> None:
            flags[tree.name], tree.url = given, urls[tree.name]

        monkeypatch.setattr(commits.Tree, "serve", start)
        monkeypatch.setattr(commits.Tree, "wait_until_ready", lambda *_, **__: None)
        trees = [f"--tree={name}={tmp_path}" for name in urls]
        sizes = ("--requests", "2", "--input", "5", "--output", "3", "--rounds", "2")
        argv = [str(out), *trees, "--own", "b=--x 'y z'", "--model", str(model), *sizes, "--", "--f"]
        assert commits.main(argv) == 0
    assert flags == {
        "a": ["--model-path", str(model), "--f"],
        "b": ["--model-path", str(model), "--f", "--x", "y z"],
    }
    ports = {int(url.rpartition(":")[2]): name for name, url in urls.items()}
    assert [ports[port] for port, _ in seen] == ["a", "b", "b", "a", "a", "b"]
    prompts = [ids for _, ids in seen]
    assert prompts[::2] == prompts[1::2] and len({str(ids) for ids in prompts}) == 3
    assert [len(ids) for ids in prompts[0]] == [5, 5]
    found = json.loads(out.read_text())
    assert {name: len(rows) for name, rows in found["runs"].items()} == {"a": 2, "b": 2}
    assert found["trees"] == {"a": "unknown", "b": "unknown"}
    assert found["medians"]["a"]["prefill_seconds_ratio"] == 1
    assert found["medians"]["b"]["decode_tokens_per_second_ratio"] == pytest.approx(1, rel=0.9)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tree", "a"], "'a' is not NAME=VALUE"),
        (["--tree", "a=.", "--own", "b=--x"], "--own: 'b' is not a --tree: a"),
        (["--tree", "a=.", "--tree", "a=/tmp"], "--tree: a is named twice"),
        (["--tree", "a=.", "--own", "a=--x", "--own", "a=--y"], "--own: a is named twice"),
        (["--tree", "a=.", "--rounds", "0"], "'0' is not an integer from 1"),
    ],
)
def test_what_it_refuses(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        commits.main(["out.json", "--model", "tiny", *argv])
    assert caught.value.code == 2 and message in capsys.readouterr().err
