"""The servers tests share: one in use, the next one starting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

from .server import Reply, Server, ServerFailed
from .specs import SERVERS

Prompts = tuple[tuple[int, ...], ...]

# A server of a tiny model takes 4 GiB, most of it imported code.
MEMORY_TO_START_NEXT = 10 * 2**30


class Host:
    """Hands out servers by name. One is in use; where memory allows, the next of ``plan`` starts meanwhile.

    Starting is nearly all of a server's cost and uses one core most of the time. A server that fails to
    start fails every test that asks for it, without a second wait.

    Args:
        logs: folder for the servers' logs.
        plan: names in the order tests will ask for them.
    """

    def __init__(self, logs: Path, plan: Sequence[str]) -> None:
        self._logs = logs
        self._plan = list(plan)
        self._current: Server | None = None
        self._next: Server | None = None
        self._failures: dict[str, str] = {}
        self._outputs: dict[tuple[str, Prompts, int, int], list[Reply]] = {}
        self._launches = 0

    def get(self, name: str) -> Server:
        """The running server ``name``; ends another one first. Raises ServerFailed."""
        if name in self._failures:
            raise ServerFailed(self._failures[name])
        current = self._current
        if current is not None and current.spec.name == name and current.alive:
            return current
        self._stop_current()
        if self._next is None or self._next.spec.name != name:
            self._stop_next()
            self._next = self._launch(name)
        server, self._next = self._next, None
        try:
            server.wait_until_ready()
        except ServerFailed as error:
            self._failures[name] = str(error)
            server.stop()
            raise
        self._current = server
        self._launch_next(name)
        return server

    def outputs(self, name: str, prompts: Prompts, new_tokens: int, *, clients: int = 16) -> list[Reply]:
        """Greedy outputs of server ``name``, empty cache; asked once, to compare two servers in turn."""
        key = (name, prompts, new_tokens, clients)
        if key not in self._outputs:
            server = self.get(name)
            server.flush_cache()
            self._outputs[key] = server.generate_all(prompts, new_tokens, clients=clients)
        return self._outputs[key]

    def stop(self) -> None:
        """End every server."""
        self._stop_current()
        self._stop_next()

    def _launch(self, name: str) -> Server:
        self._launches += 1
        server = Server(SERVERS[name], self._logs / f"{self._launches:02d}-{name}.log")
        server.launch()
        return server

    def _launch_next(self, name: str) -> None:
        later = self._plan[self._plan.index(name) + 1 :] if name in self._plan else []
        if self._next is None and later and psutil.virtual_memory().available > MEMORY_TO_START_NEXT:
            self._next = self._launch(later[0])

    def _stop_current(self) -> None:
        if self._current is not None:
            self._current.stop()
            self._current = None

    def _stop_next(self) -> None:
        if self._next is not None:
            self._next.stop()
            self._next = None
