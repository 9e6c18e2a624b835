"""Requests under churn, each compared with a reference run alone, and everything back as it was.

``make test`` runs a part, ``make test-slow`` all 2,000. LT_CHURN_WITHOUT="updates,embeds" leaves features
out, LT_CHURN_SEED takes another seed, LT_CHURN_OUT=folder writes what happened.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest

from lt_sglang.config import LIST

from . import churn
from .churn_judges import Verdict, judge_dynamic, judge_static
from .dynamic_reference import DynamicReference
from .models import SEED, ensure_model
from .reference import Reference
from .server import Server
from .specs import (
    DYNAMIC_CHURN,
    DYNAMIC_CHURN_LIST,
    DYNAMIC_CHURN_RETRACT,
    DYNAMIC_HOST,
    DYNAMIC_SERVERS,
    HOST,
    LAZY_SERVERS,
    REUSE,
)

pytestmark = pytest.mark.engine

PART, WHOLE = 300, 2000
UPDATE_EVERY = 75
FIRST, SECOND = "default", "second"


def features() -> churn.Features:
    """All, but those that LT_CHURN_WITHOUT names."""
    left_out = {name for name in os.environ.get("LT_CHURN_WITHOUT", "").split(",") if name}
    unknown = left_out - {field.name for field in fields(churn.Features)}
    assert not unknown, f"LT_CHURN_WITHOUT: {sorted(unknown)} are none of {fields(churn.Features)}"
    return churn.Features(**dict.fromkeys(left_out, False))


def models() -> dict[str, Path]:
    """The weights that are exchanged, by version."""
    return {FIRST: ensure_model("llama"), SECOND: ensure_model("llama", SEED + 1)}


def seed_of(count: int) -> int:
    """The same each time, unless LT_CHURN_SEED says otherwise."""
    return int(os.environ.get("LT_CHURN_SEED", count))


def ask(server: Server, count: int) -> churn.Outcome:
    """Run ``count`` requests on a server that is then as it was before."""
    wanted = features()
    made = churn.jobs(count, seed_of(count), wanted)
    flush = "--disable-radix-cache" not in server.spec.flags
    steps = churn.with_updates(made, models(), UPDATE_EVERY, flush) if wanted.updates else list(made)
    server.flush_cache()
    before = churn.state(server)
    outcome = churn.run(server, steps)
    if wanted.updates:
        churn.update(server, churn.Update(FIRST, models()[FIRST], True))
    churn.assert_state(server, before)
    return outcome


def write(name: str, count: int, verdict: Verdict) -> None:
    """What happened, where LT_CHURN_OUT says."""
    if folder := os.environ.get("LT_CHURN_OUT"):
        report = {"server": name, "seed": seed_of(count), "without": os.environ.get("LT_CHURN_WITHOUT", "")}
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(report | verdict.as_json(), indent=1)
        (Path(folder) / f"{name}-{count}.json").write_text(text + "\n", encoding="utf-8")


def assert_worth_it(verdict: Verdict, wanted: churn.Features, cached: int) -> None:
    """What should happen did; cached: answers that must have found a prefix in the cache."""
    assert verdict.with_cached_prefix >= cached
    assert bool(verdict.cut) == wanted.aborts and bool(verdict.copies) == wanted.copies
    assert bool(verdict.scored) == wanted.embeds
    assert len(verdict.versions) == (2 if wanted.updates else 1)


def swapped(outcome: churn.Outcome) -> churn.Outcome:
    """Some answers, as if they had come from the other weights: no judge may pass them."""
    other = {FIRST: SECOND, SECOND: FIRST}
    some = [answer for answer in outcome.answers if len(answer.tokens) > 8][:12]
    assert len(some) == 12
    return churn.Outcome([replace(answer, version=other[answer.version]) for answer in some])


COUNTS = [pytest.param(PART, id="part"), pytest.param(WHOLE, id="whole", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.served_by(REUSE)
def test_static(count: int, server: Server, record_property: pytest.RecordProperty) -> None:
    record_property("seed", seed_of(count))
    outcome = ask(server, count)
    lazy = LAZY_SERVERS[REUSE]
    make = partial(Reference, lazy_layers=lazy.layers, sink_tokens=lazy.sinks, recent_tokens=lazy.recent)
    references = {version: make(folder) for version, folder in models().items()}
    verdict = judge_static(outcome, references)
    assert len({rid for rid, *_ in judge_static(swapped(outcome), references).wrong}) > 5
    write("static", count, verdict)
    verdict.assert_equal()
    assert verdict.retractions > 0, "nothing was retracted"
    assert_worth_it(verdict, features(), verdict.answers // 20)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.served_by(DYNAMIC_CHURN)
def test_dynamic(count: int, server: Server, record_property: pytest.RecordProperty) -> None:
    verdict = churned_dynamic(server, count, record_property)
    assert_worth_it(verdict, features(), 3)  # copies of a prompt do not read one another's


@pytest.mark.slow
@pytest.mark.served_by(DYNAMIC_CHURN_RETRACT)
def test_dynamic_retracted(server: Server, record_property: pytest.RecordProperty) -> None:
    """Admission reckons with a small share of each output, so that memory runs out in decode."""
    verdict = churned_dynamic(server, WHOLE, record_property)
    assert verdict.retractions > 0, "nothing was retracted"


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.served_by(DYNAMIC_CHURN_LIST)
def test_list(count: int, server: Server, record_property: pytest.RecordProperty) -> None:
    """The third prompt with the same beginning and a short rest has a hit."""
    verdict = churned_dynamic(server, count, record_property)
    assert_worth_it(verdict, features(), verdict.answers // 40)  # long rests compute all of it


@pytest.mark.slow
@pytest.mark.served_by(HOST)
def test_static_from_the_host(server: Server, record_property: pytest.RecordProperty) -> None:
    """As ``test_static``; what is cached goes to host memory and comes back."""
    record_property("seed", seed_of(WHOLE))
    outcome = ask(server, WHOLE)
    lazy = LAZY_SERVERS[HOST]
    make = partial(Reference, lazy_layers=lazy.layers, sink_tokens=lazy.sinks, recent_tokens=lazy.recent)
    verdict = judge_static(outcome, {version: make(folder) for version, folder in models().items()})
    write(HOST, WHOLE, verdict)
    verdict.assert_equal()
    assert_worth_it(verdict, features(), verdict.answers // 4)
    assert server.lighttransfer()["sinks"]["restored"] > 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.served_by(DYNAMIC_HOST)
def test_dynamic_from_the_host(count: int, server: Server, record_property: pytest.RecordProperty) -> None:
    """As ``test_dynamic``; what is cached goes to host memory and comes back."""
    verdict = churned_dynamic(server, count, record_property)
    assert_worth_it(verdict, features(), verdict.answers // 20)
    assert server.lighttransfer()["sinks"]["restored"] > 0


def churned_dynamic(server: Server, count: int, record_property: pytest.RecordProperty) -> Verdict:
    """Every answer equals that of a reference that is given the layers it was told."""
    record_property("seed", seed_of(count))
    outcome = ask(server, count)
    lazy = DYNAMIC_SERVERS[server.spec.name]
    references = {
        # It is told the layers, so the score plays no part.
        version: DynamicReference(folder, lazy.keep, lazy.sinks, lazy.recent, "lighttransfer", lazy.default)
        for version, folder in models().items()
    }
    judge = partial(judge_dynamic, references=references, listed=lazy.score == LIST)
    verdict = judge(outcome)
    assert len({rid for rid, *_ in judge(swapped(outcome)).wrong}) > 5
    write(server.spec.name, count, verdict)
    verdict.assert_equal()
    return verdict
