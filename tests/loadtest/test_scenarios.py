"""Scenario files: what ships loads, what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lt_sglang.bench.rehearsal import rehearsal
from lt_sglang.bench.scenario import Scenario
from lt_sglang.bench.scenario_file import as_mapping, load_scenarios, pick, pick_cases
from lt_sglang.config import CONFIG_KEY, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.options import resolve_config, take_options
from lt_sglang.planner.shapes import CONFIGS

from .runs import REPOSITORY, scenario, write

FILES = sorted((REPOSITORY / "loadtest" / "scenarios").rglob("*.yaml"))
SCENARIOS = [(path, one) for path in FILES for one in load_scenarios(path)]
SHARED = {"input": 8, "output": 1, "shared": {"prefixes": 1, "tokens": 8}}
NAMES = [one.name for _, one in SCENARIOS]


def load(folder: Path, **changes: Any) -> Scenario:
    return load_scenarios(write(folder, scenario(**changes)))[0]


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 30


@pytest.mark.parametrize("one", [one for _, one in SCENARIOS], ids=NAMES)
def test_a_shipped_scenario_fits_its_model(one: Scenario) -> None:
    if one.engine.shape is None:
        pytest.skip("it is for any model")
    shape = CONFIGS[one.engine.shape]
    overrides = {CONFIG_KEY: dict(one.engine.lighttransfer)}
    config = resolve_config(take_options([])[0], "shape", shape, overrides)
    assert config is not None and config.lazy_layers
    longest = max(
        (kind.input.high + kind.output.high) * kind.turns + (kind.shared.tokens if kind.shared else 0)
        if kind.input and kind.output
        else kind.trace.longest + kind.trace.longest_output  # type: ignore[union-attr]
        for kind in one.traffic
    )
    assert longest <= shape["max_position_embeddings"]


@pytest.mark.parametrize("one", [one for _, one in SCENARIOS], ids=NAMES)
def test_a_scenario_survives_being_written(one: Scenario, tmp_path: Path) -> None:
    for written in (one, rehearsal(one)):
        path = tmp_path / "again.yaml"
        path.write_text(json.dumps(as_mapping(written)))
        assert load_scenarios(path) == (written,)


def test_a_rehearsal_is_small() -> None:
    for _, one in SCENARIOS:
        small = rehearsal(one)
        assert small.engine.shape == "tiny" and small.engine.tp <= 2
        assert (small.load.requests or 0) <= 6 and (small.load.seconds or 0) <= 20
        assert rehearsal(one, 8).engine.tp == one.engine.tp


def test_a_rehearsal_of_a_given_list_has_one(tmp_path: Path) -> None:
    given = {"mode": "dynamic", "score": "list", "lazy_layers": "8-23", "keep": 16}
    small = rehearsal(load(tmp_path, engine={"shape": "mistral-7b", "lighttransfer": given})).engine
    layers = CONFIGS["tiny"]["num_hidden_layers"]
    settled = LightTransferConfig.from_dict(small.lighttransfer).settle(layers)
    assert settled.dynamic and settled.score == "list" and settled.keep == layers // 2


def test_cases_are_laid_over_the_file(tmp_path: Path) -> None:
    cases = [{"name": "a"}, {"name": "b", "load": {"users": 9}, "engine": {"shape": "tiny"}}]
    found = load_scenarios(write(tmp_path, scenario(cases=cases)))
    assert [one.name for one in found] == ["small-a", "small-b"]
    assert [one.load.users for one in found] == [4, 9] and found[1].load.requests == 8
    assert pick(found, "b") is pick(found, "small-b") is found[1]
    for name in (None, "c"):
        with pytest.raises(LightTransferError, match="small-a, small-b"):
            pick(found, name)


def test_cases_are_picked_over_files(tmp_path: Path) -> None:
    one = load_scenarios(write(tmp_path, scenario(cases=[{"name": "a"}, {"name": "b"}])))
    two = load_scenarios(write(tmp_path, scenario(name="big", cases=[{"name": "b"}, {"name": "c"}])))
    assert pick_cases([one, two], []) == [one, two]
    assert pick_cases([one, two], ["a"]) == [one[:1]]
    assert pick_cases([one, two], ["c", "b"]) == [one[1:], two[::-1]]
    assert pick_cases([one, two], ["big-b"]) == [two[:1]]
    with pytest.raises(LightTransferError, match="--case d: must be one of small-a, small-b, big-b, big-c"):
        pick_cases([one, two], ["a", "d"])


def test_a_case_is_not_another_one_that_ends_like_it() -> None:
    """A phase of 32K prompts took minutes beside the case of that name."""
    files = [
        load_scenarios(REPOSITORY / "loadtest/scenarios/elastic" / name)
        for name in ("2-long.yaml", "3-changing.yaml")
    ]
    for name in ("32k-static", "8k-static", "8k-dynamic"):
        assert [[one.name for one in some] for some in pick_cases(files, [name])] == [[f"elastic-{name}"]]
    picked = pick_cases(files, ["phase-32k-static", "elastic-2k-8k-static"])
    assert [one.name for some in picked for one in some] == [
        "elastic-phase-32k-static",
        "elastic-2k-8k-static",
    ]
    assert pick(files[1], "32k-static").name == "elastic-phase-32k-static"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api": "telepathy"}, "api: 'telepathy' is not one of generate, completions, chat"),
        ({"load": {"kind": "closed", "requests": 1}}, "load.users: None is not an integer from 1"),
        ({"load": {"kind": "closed", "users": 2}}, "one of requests and seconds must be given"),
        ({"load": {"kind": "poisson", "rate": -1, "requests": 1}}, "load.rate: -1 is not a number from"),
        ({"load": {"kind": "trace", "requests": 1}}, "load.kind: trace needs traffic of one kind with"),
        ({"load": {"kind": "closed", "users": 1, "request": 3}}, "load.request: unknown, allowed are kind"),
        (
            {"load": {"kind": "poisson", "rate": 1, "requests": 1, "fill": True}},
            "load.fill: only with kind closed",
        ),
        (
            {"load": {"kind": "closed", "users": 2, "requests": 2, "fill": True}, "traffic": SHARED},
            "load.fill: needs prompts of known lengths",
        ),
        ({"load": [1]}, "load: [1] is not a mapping with kind, users"),
        ({"traffic": []}, "traffic: must be a mapping, or a list"),
        ({"traffic": {"input": 0, "output": 1}}, "traffic[0].input: 0 is not a number of tokens from 1"),
        (
            {"traffic": {"input": {"uniform": {"low": 9, "high": 3}}, "output": 1}},
            "high: 3 is not an integer",
        ),
        ({"traffic": {"input": 8, "output": 1, "turns": 2}, "api": "completions"}, "turns: only 1 with api"),
        (
            {"traffic": {"trace": {"source": "mooncake", "path": "x"}, "input": 3}},
            "traffic[0].trace: has its own lengths",
        ),
        (
            {"traffic": {"trace": {"source": "mine", "path": "x"}}},
            "traffic[0].trace.source: 'mine' is not one of mooncake, azure",
        ),
        ({"aborts": {"share": 2}}, "aborts.share: 2 is not a number from 0 to 1"),
        ({"aborts": {"how": "kindly"}}, "aborts.how: 'kindly' is not one of disconnect, abort_request"),
        ({"gates": {"p99_ttft": {"max": 1}}}, "gates.p99_ttft: unknown, allowed are"),
        ({"gates": {"p99_ttft_ms": {}}}, "gates.p99_ttft_ms: min, max or both"),
        ({"slo": {"ttft_ms": "soon"}}, "slo.ttft_ms: 'soon' is not a number from 0"),
        ({"engine": {"shape": "gpt"}}, "engine.shape: 'gpt' is not one of mistral-7b"),
        ({"engine": {"shape": "tiny"}, "api": "chat"}, "api: 'chat' needs a tokenizer"),
        ({"seed": 1.5}, "seed: 1.5 is not an integer from 0"),
        ({"about": None}, "about: None is not a text"),
        ({"cases": [1]}, "cases: must be a list of mappings"),
    ],
)
def test_a_bad_file_names_the_field_and_what_it_allows(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LightTransferError) as error:
        load(tmp_path, **changes)
    assert message in str(error.value) and "scenario.yaml" in str(error.value)


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    for text in ("a: [", "- 1"):
        path.write_text(text)
        with pytest.raises(LightTransferError, match=r"scenario\.yaml"):
            load_scenarios(path)
    with pytest.raises(LightTransferError, match="cannot be read"):
        load_scenarios(tmp_path / "none.yaml")
