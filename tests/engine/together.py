"""Several requests at once, with fields of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .server import Reply, Server

# Prompt, new tokens, further fields of the body.
Job = tuple[list[int], int, dict[str, Any]]


def send(server: Server, jobs: Sequence[Job]) -> list[Reply]:
    """The answers, in the order of the jobs."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: server.generate(job[0], job[1], **job[2]), jobs))


class Running:
    """Requests as streams, in the background."""

    def __init__(self, server: Server, jobs: Sequence[Job]) -> None:
        self._first = threading.Event()
        self._begun = [threading.Event() for _ in jobs]
        self._pool = ThreadPoolExecutor(len(jobs))
        self._futures = [
            self._pool.submit(self._run, server, job, begun)
            for job, begun in zip(jobs, self._begun, strict=True)
        ]

    def _run(self, server: Server, job: Job, begun: threading.Event) -> list[int]:
        output: list[int] = []
        for so_far in server.stream(job[0], job[1], **job[2]):
            output = so_far
            begun.set()
            self._first.set()
        return output

    def wait_for_tokens(self) -> None:
        """Until one has a token."""
        assert self._first.wait(60)

    def wait_for_all(self) -> None:
        """Until every job has a token."""
        assert all(begun.wait(60) for begun in self._begun)

    @property
    def finished(self) -> bool:
        """Whether one has ended."""
        return any(future.done() for future in self._futures)

    def outputs(self) -> list[list[int]]:
        """All tokens of each, once all have ended."""
        return [future.result() for future in self._futures]

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()


def pause_again_and_again(server: Server, running: Running, mode: str, times: int) -> int:
    """Pause and go on, with some steps in between; how many pauses found every request running."""
    found = 0
    for _ in range(times):
        server.post("/pause_generation", {"mode": mode}).raise_for_status()
        found += not running.finished
        server.post("/continue_generation", {}).raise_for_status()
        time.sleep(0.05)
    return found


def greedy(new_tokens: int) -> dict[str, Any]:
    """Sampling parameters."""
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
