"""Requests under churn: everything a client and an operator do, at once, on one server.

Shared prefixes, n up to 4, priorities, replaced embeddings, streams that are dropped, requests that are
aborted, weights that are exchanged. churn_judges.py holds every answer against a reference run alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from . import storm
from .models import COMMON, EOS, FIRST_TOKEN
from .prompts import random_prompt
from .server import Server, ServerFailed, events

# Stands where an embedding is replaced.
PLACEHOLDER = FIRST_TOKEN
REPLACED = 6
# Of a scored prompt. SGLang keeps it out of the tree, so its window does not slide between chunks: longer
# ones fill the streaming pool and wait for ever, unless lt_sglang sees to it.
SCORED_LONGEST = 200
LABELS = (10, 77, 200, 301, 411)
ITEM = 9


@dataclass(frozen=True)
class Features:
    """What happens besides plain requests; each can be left out, to find what a mismatch comes from."""

    aborts: bool = True
    copies: bool = True
    priority: bool = True
    updates: bool = True
    embeds: bool = True


@dataclass(frozen=True)
class Job:
    """One request.

    copies: SGLang's n. embeds: vectors in place of the first PLACEHOLDERs; such a request is scored, not
    continued. drop_after: read so many chunks, then hang up. abort: /abort_request after the first chunk.
    """

    rid: str
    prompt: tuple[int, ...]
    new_tokens: int
    copies: int = 1
    priority: int | None = None
    embeds: tuple[tuple[float, ...], ...] = ()
    drop_after: int | None = None
    abort: bool = False

    @property
    def cut(self) -> bool:
        """Whether it may end early."""
        return self.abort or self.drop_after is not None


@dataclass(frozen=True)
class Update:
    """Weights are exchanged for those of a folder, called ``version`` from then on."""

    version: str
    model: Path
    flush: bool


@dataclass(frozen=True)
class Answer:
    """What one request, or one of n copies, got.

    version: of the weights. choice: in dynamic mode, its layers. scores: of LABELS, if it was scored.
    """

    job: Job
    tokens: tuple[int, ...] = ()
    version: str = ""
    cached: int = 0
    retractions: int = 0
    choice: Mapping[str, Any] | None = None
    scores: tuple[float, ...] = ()


@dataclass
class Outcome:
    """All answers, requests that failed: (rid, why), and those that were cut before they told anything."""

    answers: list[Answer] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    silent: list[Job] = field(default_factory=list)


def jobs(
    count: int, seed: int, features: Features, longest: int = 500, longest_output: int = 60
) -> list[Job]:
    """``count`` requests and some more over two dozen prefixes; a third of them plain."""
    rng = random.Random(seed)
    prefixes = [random_prompt(rng.randint(5, longest), rng) for _ in range(24)]
    made = []
    for number in range(count):
        prompt = list(rng.choice(prefixes))
        if rng.random() < 0.7:
            prompt = prompt[: rng.randint(1, len(prompt))]
            prompt += random_prompt(rng.randint(0, min(150, longest - len(prompt))), rng)
        rid, new_tokens = f"churn-{seed}-{number:05d}", rng.randint(1, longest_output)
        priority = rng.choice((0, 5, 40)) if features.priority and rng.random() < 0.5 else None
        kind = rng.random()
        if kind < 0.1 and features.aborts:
            job = Job(rid, tuple(prompt), new_tokens, priority=priority, drop_after=rng.randint(0, 20))
        elif 0.1 <= kind < 0.2 and features.aborts:
            job = Job(rid, tuple(prompt), new_tokens, priority=priority, abort=True)
        elif 0.2 <= kind < 0.4 and features.copies:
            job = Job(rid, tuple(prompt), new_tokens, rng.randint(2, 4), priority)
        elif 0.4 <= kind < 0.55 and features.embeds:
            job = _scored(rid, prompt[:SCORED_LONGEST], rng)
        else:
            job = Job(rid, tuple(prompt), new_tokens, priority=priority)
        made.append(job)
        if job.embeds and rng.random() < 0.3:
            # The very ids: it must not see the vectors.
            made.append(Job(f"{rid}-plain", (*job.prompt, ITEM, 11, 12), 16))
    return made


def _scored(rid: str, prompt: Sequence[int], rng: random.Random) -> Job:
    """A prompt whose first tokens are other vectors; by its ids it is any other request's beginning."""
    width = COMMON["hidden_size"]
    plain = [PLACEHOLDER + 1 if token == PLACEHOLDER else token for token in prompt]
    tokens = [PLACEHOLDER] * REPLACED + plain[REPLACED:]
    vectors = tuple(tuple(round(rng.gauss(0, 0.2), 4) for _ in range(width)) for _ in range(REPLACED))
    return Job(rid, tuple(tokens), 0, embeds=vectors)


def with_updates(
    made: Sequence[Job], models: Mapping[str, Path], every: int, flush: bool
) -> list[Job | Update]:
    """An exchange of weights after every ``every`` requests, in turn; the last brings the first back."""
    steps: list[Job | Update] = []
    versions = list(models)
    turn = 0
    for number, job in enumerate(made):
        if number and number % every == 0:
            turn += 1
            version = versions[turn % len(versions)]
            steps.append(Update(version, models[version], flush))
        steps.append(job)
    return steps


def run(server: Server, steps: Sequence[Job | Update], clients: int = 24) -> Outcome:
    """Take the steps in order, up to ``clients`` at once."""
    outcome = Outcome()

    def take(step: Job | Update) -> list[Answer]:
        if isinstance(step, Update):
            update(server, step)
            return []
        try:
            found = _send(server, step)
            if not found:
                outcome.silent.append(step)
            return found
        except ServerFailed:
            raise
        except Exception as error:  # each belongs into the report, beside the other requests' ends
            outcome.failed.append((step.rid, f"{type(error).__name__}: {error}"))
            return []

    with ThreadPoolExecutor(clients) as pool:
        for answers in pool.map(take, steps):
            outcome.answers += answers
    return outcome


def update(server: Server, step: Update) -> None:
    """Exchange the weights."""
    body = {"model_path": str(step.model), "flush_cache": step.flush, "weight_version": step.version}
    answer = server.post("/update_weights_from_disk", body)
    assert answer.status_code == 200 and answer.json()["success"], answer.text


def _send(server: Server, job: Job) -> list[Answer]:
    if job.embeds:
        return [_score(server, job)]
    parameters = {
        "temperature": 0,
        "max_new_tokens": job.new_tokens,
        "n": job.copies,
        "custom_params": {"lighttransfer": True},
    }
    body: dict[str, Any] = {"input_ids": list(job.prompt), "sampling_params": parameters}
    if job.copies == 1:
        body["rid"] = job.rid
    if job.priority is not None:
        body["priority"] = job.priority
    if job.cut:
        chunks = []
        for chunk in islice(_stream(server, body), job.drop_after):
            chunks.append(chunk)
            if job.abort:
                server.abort(job.rid)
        return [_answer(job, chunks[-1])] if chunks else []
    answer = server.post("/generate", body)
    assert answer.status_code == 200, f"{answer.status_code} {answer.text[:300]}"
    data = answer.json()
    found = [_answer(job, one) for one in (data if isinstance(data, list) else [data])]
    assert len(found) == job.copies, data
    assert all(len(one.tokens) == job.new_tokens or one.tokens[-1] == EOS for one in found), data
    return found


def _stream(server: Server, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    with server.post("/generate", {**body, "stream": True}, stream=True) as answer:
        assert answer.status_code == 200, answer.text
        yield from (event for event in events(answer) if "output_ids" in event)


def _answer(job: Job, data: Mapping[str, Any]) -> Answer:
    meta = data["meta_info"]
    (choice,) = meta.get("lighttransfer") or [None]
    return Answer(
        job,
        tuple(data["output_ids"]),
        str(meta["weight_version"]),
        meta.get("cached_tokens", 0),
        meta.get("num_retractions", 0),
        choice,
    )


def _score(server: Server, job: Job) -> Answer:
    body = {
        "query": list(job.prompt),
        "items": [[ITEM]],
        "label_token_ids": list(LABELS),
        "embed_override_token_id": PLACEHOLDER,
        "query_embed_overrides": [list(vector) for vector in job.embeds],
        "model": "default",
    }
    answer = server.post("/v1/score", body)
    assert answer.status_code == 200, f"{answer.status_code} {answer.text[:300]}"
    (scores,) = answer.json()["scores"]
    return Answer(job, scores=tuple(scores))


def state(server: Server) -> dict[str, Any]:
    """What must be as it was once nothing runs: memory, sink and layer sets, processes. Empties the cache."""
    storm.assert_all_returned(server)
    shown = server.lighttransfer()
    sets = shown.get("layer_sets", {})
    return {
        "memory": shown["memory"],
        "layer_sets": {name: sets[name] for name in ("requests", "stored") if name in sets},
        "processes": sorted(process.name() for process in server.processes()),
    }


def assert_state(server: Server, before: Mapping[str, Any]) -> None:
    """``state`` is what it was."""
    after = state(server)
    assert after == before, (before, after)
