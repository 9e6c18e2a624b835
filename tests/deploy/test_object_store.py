"""An engine whose weights come out of an object store, as the chart's model.url starts it."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.engine.environment import server_environment
from tests.engine.models import ensure_model
from tests.engine.server import ServerSpec, running

from ..http_server import serving
from .chart import engine_flags, template
from .test_engine_metrics import FLAGS, LAZY

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BUCKET, FOLDER = "models", "some/tiny-llama"
LISTED = """\
<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">\
<Name>{bucket}</Name><Prefix>{prefix}</Prefix><KeyCount>{count}</KeyCount><MaxKeys>1000</MaxKeys>\
<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"""
ENTRY = """\
<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"1"</ETag>\
<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"""


@contextmanager
def object_store(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address and the objects that were read: a bucket with the files of ``folder``."""
    objects = {f"{FOLDER}/{file.name}": file.read_bytes() for file in folder.iterdir() if file.is_file()}
    read: list[str] = []

    class Store(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _say(self, status: int, body: bytes, kind: str, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def _list(self, query: dict[str, list[str]]) -> None:
            (prefix,) = query["prefix"]
            found = [
                ENTRY.format(key=key, size=len(objects[key])) for key in objects if key.startswith(prefix)
            ]
            said = {"bucket": BUCKET, "prefix": prefix, "count": len(found), "contents": "".join(found)}
            self._say(200, LISTED.format(**said).encode(), "application/xml")

        def do_GET(self) -> None:
            path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
            if path.strip("/") == BUCKET:
                return self._list(query)
            body = objects.get(path.removeprefix(f"/{BUCKET}/"))
            if body is None:
                return self._say(404, b"<Error><Code>NoSuchKey</Code></Error>", "application/xml")
            if self.command == "GET":
                read.append(path.rpartition("/")[2])
            state = {
                "ETag": '"1"',
                "Accept_Ranges": "bytes",
                "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            }
            part = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", self.headers.get("Range", ""))
            if part is None:
                return self._say(200, body, "binary/octet-stream", **state)
            first, last = int(part[1]), min(int(part[2]), len(body) - 1)
            state["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            return self._say(206, body[first : last + 1], "binary/octet-stream", **state)

        do_HEAD = do_GET  # noqa: N815 - the name that the server asks for

        def log_message(self, *_: Any) -> None: ...

    with serving(Store) as url:
        yield url, read


def test_weights_are_streamed_and_answers_are_the_same(image_path: Path, tmp_path: Path) -> None:
    """With the packages of the engine's image; no weights reach a disk."""
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 512) for _ in range(length)] for length in (40, 300, 700)]
    local = ServerSpec("local", partial(ensure_model, "llama"), LAZY, FLAGS)
    (tmp_path / "local").mkdir()
    with running(local, tmp_path / "local") as server:
        wanted = [reply.tokens for reply in server.generate_all(prompts, 24)]
    address = engine_flags(template(f"model.url=s3://{BUCKET}/{FOLDER}"))["--model-path"]
    cache = tmp_path / "cache"
    with object_store(ensure_model("llama")) as (url, read):
        env = {
            "PYTHONPATH": os.pathsep.join([server_environment()["PYTHONPATH"], str(image_path)]),
            "SGLANG_CACHE_DIR": str(cache),
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }
        with running(ServerSpec("streamed", lambda: address, LAZY, FLAGS, env=env), tmp_path) as server:
            assert [reply.tokens for reply in server.generate_all(prompts, 24)] == wanted
            assert "Runai Model Streamer" in server.log_text()
    assert read.count("model.safetensors") > 0 and "config.json" in read
    assert list(cache.rglob("config.json")) and not list(cache.rglob("*.safetensors"))
