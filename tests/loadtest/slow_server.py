"""A small HTTP server that streams tokens after known delays, in the format of /generate or of OpenAI."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from ..http_server import serving


@dataclass
class Delays:
    """Seconds before the first token and between tokens; what the server saw.

    fail_every: every so many requests the answer is 500. break_every: the connection ends after one token.
    info: what /server_info answers. admin_key: what /abort_request and /flush_cache ask for.
    """

    first: float = 0.2
    between: float = 0.03
    fail_every: int = 0
    break_every: int = 0
    info: dict[str, Any] | None = None
    admin_key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0


@contextmanager
def serve(delays: Delays) -> Iterator[str]:
    """Serve until the block ends; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            if delays.info is None or self.path != "/server_info":
                self.send_error(404)
                return
            body = json.dumps(delays.info).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            if self.path.partition("?")[0] in ("/abort_request", "/flush_cache"):
                given = self.headers.get("Authorization")
                wanted = delays.admin_key and f"Bearer {delays.admin_key}"
                self.send_response(200 if given == wanted else 401)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            delays.requests.append({"path": self.path, **body})
            number = len(delays.requests)
            if delays.fail_every and number % delays.fail_every == 0:
                self.send_error(500, "made to fail")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                self._stream(body, bool(delays.break_every) and number % delays.break_every == 0)
            except OSError:
                delays.dropped += 1
                self.close_connection = True

        def _stream(self, body: dict[str, Any], broken: bool) -> None:
            chat = "messages" in body
            count = body["max_tokens"] if chat else body["sampling_params"]["max_new_tokens"]
            for token in range(1, count + 1):
                time.sleep(delays.first if token == 1 else delays.between)
                self._send(_openai(token) if chat else _generate(body, token, count))
                if broken:
                    self.close_connection = True
                    return
            if chat:
                words = sum(len(message["content"].split()) for message in body["messages"])
                usage = {"prompt_tokens": 2 * words + 7, "completion_tokens": count}
                self._send({"choices": [], "usage": usage})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")

        def _send(self, event: dict[str, Any]) -> None:
            self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as url:
        yield url


def _generate(body: dict[str, Any], token: int, count: int) -> dict[str, Any]:
    return {
        "output_ids": list(range(token)),
        "meta_info": {
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": token,
            "finish_reason": {"type": "length"} if token == count else None,
        },
    }


def _openai(token: int) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": f" {token}"}, "finish_reason": None}]}
