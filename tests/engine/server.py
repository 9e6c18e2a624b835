"""Start, use and stop one real SGLang HTTP server."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import requests

from lt_sglang.launch.cpu import cpu_server_args
from lt_sglang.launch.engine import generates, server_info
from lt_sglang.launch.server_process import ServerProcess

from .environment import server_environment, write_plugin

START_TIMEOUT = 600.0  # the first start on a new machine also writes all bytecode
REQUEST_TIMEOUT = 600.0  # two servers and their references may share two cores


class ServerFailed(AssertionError):
    """The server did not start, or ended; the message carries the end of its log."""


@dataclass(frozen=True)
class ServerSpec:
    """What to serve, and how.

    Attributes:
        name: how tests ask for it.
        model: returns the model's folder, or its address in an object store.
        lazy: the value of the key ``lighttransfer``; None for stock SGLang.
        flags: further server flags.
        env: further environment variables.
        tp: tensor-parallel size.
        plugin: whether SGLang finds the plug-in.
        warm_up: whether SGLang sends itself a prompt before it is ready.
        beside: a second plug-in, ``module:function``.
    """

    name: str
    model: Callable[[], Path | str]
    lazy: Mapping[str, Any] | None
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    tp: int = 1
    plugin: bool = True
    warm_up: bool = False
    beside: str | None = None

    def command(self, port: int) -> list[str]:
        """The command line that starts it."""
        backend = ["--attention-backend", "torch_native" if self.lazy is None else "lighttransfer"]
        if self.lazy is not None:
            backend += ["--json-model-override-args", json.dumps({"lighttransfer": dict(self.lazy)})]
        return [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.model())),
            *cpu_server_args(),
            *backend,
            *("--host", "127.0.0.1", "--port", str(port), "--tp-size", str(self.tp)),
            *("--dtype", "float32", "--random-seed", "1"),
            *(() if self.warm_up else ("--skip-server-warmup",)),
            *self.flags,
        ]


@dataclass(frozen=True)
class Reply:
    """One finished request: its tokens, and how many of its prompt came from the prefix cache.

    choice: in dynamic mode, what it was told of its layers if it asked.
    """

    tokens: list[int]
    cached: int
    finish: str
    choice: dict[str, Any] | None = None


@contextmanager
def running(spec: ServerSpec, folder: Path) -> Iterator[Server]:
    """A server of one's own, ready; its log is ``folder/log``. Raises ServerFailed."""
    server = Server(spec, folder / "log")
    server.launch()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


class Server(ServerProcess):
    """One server: ``launch`` it, ``wait_until_ready``, use it; ``stop`` ends the whole process tree."""

    failed = ServerFailed
    log: Path

    def __init__(self, spec: ServerSpec, log: Path) -> None:
        super().__init__("the server", log)
        self.spec = spec

    def command(self) -> list[str]:
        """The command line that starts it."""
        return self.spec.command(self.port)

    def launch(self) -> None:
        """Start the process."""
        env = server_environment(tp=self.spec.tp, plugin=self.spec.plugin, extra=self.spec.env)
        if self.spec.beside is not None:
            folder = write_plugin(self.log.with_suffix(".plugin"), "beside", self.spec.beside)
            env["PYTHONPATH"] = os.pathsep.join([str(folder), env["PYTHONPATH"]])
        self.start(self.command(), env)

    def ready(self) -> bool:
        """Whether it generates; some are started without the prompt that SGLang sends itself."""
        return generates(self.url, 5.0)

    def wait_until_ready(self, seconds: float = START_TIMEOUT, tell: bool = False) -> None:
        """Wait for the first generated token; raises ServerFailed."""
        super().wait_until_ready(seconds, tell)

    def assert_healthy(self) -> None:
        """Raise ServerFailed unless it still generates a token."""
        if not generates(self.url):
            raise ServerFailed(f"the server no longer answers\n{self.log_tail()}")

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        """POST JSON; ServerFailed if the connection breaks."""
        try:
            return requests.post(f"{self.url}{path}", json=body, timeout=REQUEST_TIMEOUT, **options)
        except requests.ConnectionError as error:
            raise ServerFailed(f"{path}: {error}\n{self.log_tail()}") from error

    def generate(self, prompt: Sequence[int], new_tokens: int, *, ask: bool = False, **body: Any) -> Reply:
        """Greedy tokens after ``prompt``; exactly ``new_tokens`` of them. ask: for the choice of layers."""
        parameters = _greedy(new_tokens, ask)
        return _reply(self._generated({"input_ids": list(prompt), "sampling_params": parameters, **body}))

    def generate_together(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        ask: bool = False,
        ignore_eos: bool = True,
    ) -> list[Reply]:
        """As ``generate``, in one body: all reach the scheduler at once, however slow the machine."""
        parameters = {**_greedy(new_tokens, ask), "ignore_eos": ignore_eos}
        body = {"input_ids": [list(prompt) for prompt in prompts], "sampling_params": parameters}
        return [_reply(data) for data in self._generated(body)]

    def generate_all(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, *, clients: int = 16, ask: bool = False
    ) -> list[Reply]:
        """As ``generate``, each prompt a request of its own, up to ``clients`` at once."""
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, new_tokens, ask=ask), prompts))

    def info(self) -> dict[str, Any]:
        """/server_info."""
        return server_info(self.url)

    def lighttransfer(self) -> dict[str, Any]:
        """What /server_info says of lazy layers."""
        return self.info()["internal_states"][0]["lighttransfer"]

    def room(self) -> int:
        """Tokens that its KV memory holds in all layers at once; more where lazy ones keep a window only."""
        memory = self.lighttransfer()["memory"]
        full, lazy = (memory["demand"]["shape"][kind] for kind in ("full_layers", "lazy_layers"))
        pages = memory["units"] * gcd(full, lazy) // (full + lazy)
        return int(pages * memory["demand"]["page_size"])

    def stream(self, prompt: Sequence[int], new_tokens: int, **body: Any) -> Iterator[list[int]]:
        """As ``generate``, streamed: all tokens so far, again and again. Closing it drops the connection."""
        body = {"input_ids": list(prompt), "sampling_params": _greedy(new_tokens), "stream": True, **body}
        with self.post("/generate", body, stream=True) as answer:
            assert answer.status_code == 200, answer.text
            for event in events(answer):
                yield event["output_ids"]

    def abort(self, rid: str = "", *, everything: bool = False) -> None:
        """/abort_request for one request or all."""
        self.post("/abort_request", {"rid": rid, "abort_all": everything}).raise_for_status()

    def flush_cache(self) -> None:
        """Empty the prefix cache; the server must be idle, and is given time to become so."""
        answer = self.post("/flush_cache", params={"timeout": 30})
        assert answer.status_code == 200, answer.text

    def _generated(self, body: dict[str, Any]) -> Any:
        answer = self.post("/generate", body)
        if answer.status_code != 200:
            raise ServerFailed(f"/generate: {answer.status_code} {answer.text}\n{self.log_tail()}")
        return answer.json()


def _greedy(new_tokens: int, ask: bool = False) -> dict[str, Any]:
    told = {"custom_params": {"lighttransfer": True}} if ask else {}
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True, **told}


def _reply(data: dict[str, Any]) -> Reply:
    meta = data["meta_info"]
    (choice,) = meta.get("lighttransfer") or [None]
    # An aborted request reports no cached tokens.
    return Reply(data["output_ids"], meta.get("cached_tokens", 0), meta["finish_reason"]["type"], choice)


def events(answer: requests.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, up to ``[DONE]``."""
    for line in answer.iter_lines():
        if not line.startswith(b"data: "):
            continue
        data = line[len(b"data: ") :]
        if data == b"[DONE]":
            return
        yield json.loads(data)
