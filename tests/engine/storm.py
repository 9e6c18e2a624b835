"""Mixed traffic: shared prefixes, repeats, streams that are dropped, requests that are aborted."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from .prompts import random_prompt
from .server import Server

IDLE_TIMEOUT = 60.0
FAULTS = re.compile(r"leak detected|Mem Leak Detected|use-after-free|double free|Scheduler hit an exception")


@dataclass(frozen=True)
class Job:
    """One request.

    drop_after: read so many chunks of the stream, then close the connection; None reads to the end.
    abort: /abort_request the moment the first chunk is there.
    """

    rid: str
    prompt: tuple[int, ...]
    new_tokens: int
    drop_after: int | None = None
    abort: bool = False


def storm(count: int, longest: int, longest_output: int, seed: int) -> list[Job]:
    """``count`` jobs over a dozen prefixes: most are cut and go on differently, a fifth ends early."""
    rng = random.Random(seed)
    prefixes = [random_prompt(_log_uniform(5, longest, rng), rng) for _ in range(12)]
    jobs = []
    for number in range(count):
        prefix = rng.choice(prefixes)
        if rng.random() < 0.7:
            prefix = prefix[: rng.randint(1, len(prefix))]
            prefix = prefix + random_prompt(rng.randint(0, min(200, longest - len(prefix))), rng)
        fate = rng.random()
        jobs.append(
            Job(
                rid=f"storm-{seed}-{number:04d}",  # SGLang aborts every request whose id begins alike
                prompt=tuple(prefix),
                new_tokens=_log_uniform(1, longest_output, rng),
                drop_after=rng.randint(0, 30) if fate < 0.1 else None,
                abort=0.1 <= fate < 0.2,
            )
        )
    return jobs


def run(server: Server, jobs: Sequence[Job], clients: int = 24) -> list[list[int]]:
    """Send the jobs, up to ``clients`` at once; the tokens each got before it ended."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda job: _run(server, job), jobs))


def assert_all_returned(server: Server) -> None:
    """No request is left, every slot and sink set is free, and SGLang's own checks have found no fault."""
    deadline = time.monotonic() + IDLE_TIMEOUT
    while (memory := server.lighttransfer()["memory"])["sink_requests"] or memory["sink_sets_in_use"]:
        assert time.monotonic() < deadline, f"requests still hold sink sets: {memory}"
        time.sleep(0.2)
    server.assert_healthy()
    server.flush_cache()  # after it: what a question is answered from stays cached
    memory = server.lighttransfer()["memory"]
    assert memory["sink_sets_used"] == memory["sink_sets_in_use"] == memory["sink_requests"] == 0, memory
    assert memory["full_slots_used"] == memory["streaming_slots_used"] == 0, memory
    assert memory["units_free"] == memory["units"], memory
    faults = [line for line in server.log_text().splitlines() if FAULTS.search(line)]
    assert not faults, faults[:5]


def _run(server: Server, job: Job) -> list[int]:
    tokens: list[int] = []
    stream = server.stream(job.prompt, job.new_tokens, rid=job.rid)
    aborting = job.abort
    for so_far in islice(stream, job.drop_after):
        tokens = so_far
        if aborting:
            server.abort(job.rid)
            aborting = False
    stream.close()
    return tokens


def _log_uniform(low: int, high: int, rng: random.Random) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))
