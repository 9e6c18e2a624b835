"""Traces, their fits, and the requests made of scenarios."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lt_sglang.bench import traces
from lt_sglang.bench.scenario import Scenario
from lt_sglang.bench.scenario_file import load_scenarios
from lt_sglang.bench.traffic import TOKEN_IDS, conversations
from lt_sglang.errors import LightTransferError

from .runs import REPOSITORY, scenario, write

PUBLIC = {
    "mooncake": REPOSITORY.parent / "shared" / "traces" / "mooncake_conversation.jsonl",
    "azure": REPOSITORY.parent / "shared" / "traces" / "azure_llm_2023_conv.csv",
}


def take(one: Scenario, count: int, seed: int | None = None) -> list[Any]:
    return list(islice(conversations(one, seed), count))


def load(folder: Path, **changes: Any) -> Scenario:
    return load_scenarios(write(folder, scenario(**changes)))[0]


@pytest.mark.parametrize("source", ["mooncake", "azure"])
def test_a_generator_has_the_quantiles_it_was_fitted_to(source: str) -> None:
    fitted = traces.load_fit(source)
    rows = list(islice(traces.generate(fitted, seed=3), 8000))
    again = traces.fit(source, rows)
    middle = slice(3, 13)
    for name in ("input_tokens", "output_tokens"):
        assert getattr(again, name)[middle] == pytest.approx(getattr(fitted, name)[middle], rel=0.12, abs=3)
    gaps = np.diff([row.at for row in rows])
    assert gaps.mean() == pytest.approx(np.trapezoid(fitted.gap, traces.PROBABILITIES), rel=0.05)
    wanted = np.trapezoid(fitted.shared, traces.PROBABILITIES)
    assert np.trapezoid(again.shared, traces.PROBABILITIES) == pytest.approx(wanted, abs=0.06)
    assert rows == list(islice(traces.generate(fitted, seed=3), 8000))
    assert rows[:50] != list(islice(traces.generate(fitted, seed=4), 50))


@pytest.mark.parametrize("source", ["mooncake", "azure"])
def test_the_fit_is_that_of_the_public_trace(source: str) -> None:
    if not PUBLIC[source].is_file():
        pytest.skip("the trace is not here")
    rows = traces.read(source, PUBLIC[source])
    assert traces.fit(source, rows) == traces.load_fit(source)
    rate = len(rows) / rows[-1].at
    generated = list(islice(traces.generate(traces.load_fit(source), 0), 8000))
    assert len(generated) / generated[-1].at == pytest.approx(rate, rel=0.1)


def test_mooncake_rows_and_what_they_share(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 0, "input_length": 1200, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 1500, "input_length": 1500, "output_length": 7, "hash_ids": [0, 1, 3]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    kind = {"name": "t", "trace": {"source": "mooncake", "path": str(path), "speed": 0.5}}
    one = load(tmp_path, traffic=kind, load={"kind": "trace", "requests": 2})
    first, second, third = take(one, 3)
    prompts = [conversation.turns[0].added for conversation in (first, second, third)]
    assert [len(prompt) for prompt in prompts] == [1200, 1500, 1200]
    assert prompts[0][:1024] == prompts[1][:1024] and prompts[0][1024:] != prompts[1][1024:1200]
    assert (first.at, second.at) == (0.0, 3.0)
    # The trace begins again with other text, and no prompt is found in the cache by accident.
    assert prompts[2][:512] != prompts[0][:512]


def test_lengths_are_scaled_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.6805900,20000,1000\n"
    )
    trace = {"source": "azure", "path": str(path), "length_scale": 0.5, "longest": 300, "longest_output": 30}
    one = load(tmp_path, traffic={"name": "t", "trace": trace}, load={"kind": "trace", "requests": 2})
    turns = [conversation.turns[0] for conversation in take(one, 2)]
    assert [(len(turn.added), turn.output_tokens) for turn in turns] == [(187, 22), (300, 30)]


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for text in ("", '{"a": 1}\n', "TIMESTAMP,ContextTokens\n1,2\n"):
        path.write_text(text)
        for source in PUBLIC:
            with pytest.raises(LightTransferError, match=f"the {source} trace"):
                traces.read(source, path)


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    traffic = [
        {"name": "a", "weight": 3, "input": {"uniform": {"low": 5, "high": 50}}, "output": 3},
        {
            "name": "b",
            "input": {"lognormal": {"median": 100, "sigma": 1.0, "low": 20, "high": 400}},
            "output": 2,
            "shared": {"prefixes": 2, "tokens": 64},
        },
    ]
    one = load(tmp_path, traffic=traffic, aborts={"share": 0.5, "after_tokens": 2})
    first = take(one, 400)
    assert first == take(one, 400) and first != take(one, 400, seed=9)
    kinds = {name: [c for c in first if c.kind == name] for name in ("a", "b")}
    assert len(kinds["a"]) == pytest.approx(300, abs=40)
    assert {len(c.turns[0].added) for c in kinds["a"]} <= set(range(5, 51))
    assert len({c.turns[0].added[:64] for c in kinds["b"]}) == 2
    lengths = [len(c.turns[0].added) - 64 for c in kinds["b"]]
    assert min(lengths) >= 20 and max(lengths) <= 400 and np.median(lengths) == pytest.approx(100, rel=0.35)
    aborted = [c.turns[0].abort_after for c in first]
    assert aborted.count(None) == pytest.approx(200, abs=40) and set(aborted) == {None, 2}
    ids = {token for c in first for token in c.turns[0].added}
    assert min(ids) >= TOKEN_IDS[0] and max(ids) < TOKEN_IDS[1]


def test_poisson_arrivals(tmp_path: Path) -> None:
    one = load(tmp_path, load={"kind": "poisson", "rate": 5.0, "requests": 1})
    gaps = np.diff([conversation.at for conversation in take(one, 4000)])
    assert gaps.mean() == pytest.approx(0.2, rel=0.06)
    # An exponential distribution's deviation is its mean.
    assert gaps.std() == pytest.approx(0.2, rel=0.08)
