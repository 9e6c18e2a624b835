"""lt_sglang.config in dynamic mode: what is accepted, what it becomes, what is refused and how."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from lt_sglang.config import DECIDE, SCORES, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.identify.scores.factory import get_score
from lt_sglang.memory.sizes import TABLE_BYTES, size_memory
from lt_sglang.memory.units import UnitShape
from lt_sglang.static_choices import CHOICES, choose, spelling


def dynamic(**given: Any) -> LightTransferConfig:
    return LightTransferConfig.from_dict({"mode": "dynamic", **given})


def test_lazy_layers_need_not_be_given() -> None:
    config = dynamic()
    assert config.dynamic and config.lazy_layers == ()
    assert not LightTransferConfig((1,)).dynamic


@pytest.mark.parametrize(
    ("keep", "layers", "number"),
    [
        (0.5, 32, 16),
        (0.5, 30, 15),
        (0.5, 7, 4),
        (0.35, 30, 10),
        (0.9, 2, None),
        (3, 6, 3),
        (1, 2, 1),
        (5, 6, 5),
    ],
)
def test_keep_is_a_number_or_a_share(keep: int | float, layers: int, number: int | None) -> None:
    config = dynamic(keep=keep)
    if number is None:
        with pytest.raises(LightTransferError, match="keep"):
            config.settle(layers)
        return
    settled = config.settle(layers)
    assert settled.keep == number and type(settled.keep) is int
    assert len(settled.lazy_layers) == layers - number
    assert settled.settle(layers) == settled, "idempotent: every rank settles again"


def test_a_settled_configuration_survives_the_model_override() -> None:
    """It travels to the ranks as JSON."""
    rng = random.Random(1)
    for _ in range(200):
        layers = rng.randint(2, 80)
        config = dynamic(
            keep=rng.randint(1, layers - 1),
            score=rng.choice(SCORES),
            decide=rng.choice(DECIDE),
            last_queries=rng.randint(1, 128),
            kv_bytes=rng.choice([None, 1, 5000]),
            check_tables=rng.choice([True, False]),
            sink_tokens=rng.choice([0, 4, 129]),
        ).settle(layers)
        again = LightTransferConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config and again.settle(layers) == config


def test_the_default_for_short_prompts_is_the_ends() -> None:
    assert dynamic(keep=3).settle(6).lazy_layers == choose("ends", 6, 3)
    assert dynamic(keep=3, lazy_layers="0,2,4").settle(6).lazy_layers == (0, 2, 4)


def test_keep_is_half_unless_given() -> None:
    assert dynamic(keep=None).settle(6) == dynamic().settle(6) == dynamic(keep=0.5).settle(6)


@pytest.mark.parametrize("keep", [{}, {"keep": None}, {"keep": 2}, {"keep": 0.34}], ids=str)
def test_a_given_list_says_how_many_layers_are_full(keep: dict[str, Any]) -> None:
    """It stays dynamic: static layers would have their windows in prefill too."""
    settled = dynamic(score="list", lazy_layers="1-3,5", **keep).settle(6)
    assert settled.dynamic and settled.score == "list"
    assert settled.lazy_layers == (1, 2, 3, 5) and settled.keep == 2
    assert settled.settle(6) == settled
    assert LightTransferConfig.from_dict(json.loads(json.dumps(settled.to_dict()))) == settled


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_lists_of_a_pattern(name: str) -> None:
    """In either mode, once the model is known; until then they travel as they were written."""
    text = spelling(name)
    for given in ({"mode": "static"}, {"mode": "dynamic", "score": "list"}):
        if name == "all" and given["mode"] == "dynamic":
            continue  # dynamic mode keeps one layer full
        config = LightTransferConfig.from_dict({**given, "lazy_layers": text}, source="file")
        assert config.lazy_layers == () and config.to_dict()["lazy_layers"] == text
        assert LightTransferConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        settled = config.settle(6)
        assert settled.mode == given["mode"]
        assert settled.lazy_layers == choose(name, 6, 0.5 if ":" in text else None)
        assert settled.source == f"file: {text} (a pattern, not calibrated)"
        assert settled.settle(6) == settled
        assert LightTransferConfig.from_dict(json.loads(json.dumps(settled.to_dict()))) == settled


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_no_scores(name: str) -> None:
    with pytest.raises(LightTransferError) as caught:
        dynamic(score=name)
    said = f"score: {name!r} looks at no prompt; in place of it, give the lazy layers as {spelling(name)!r}"
    assert str(caught.value) == said


def test_every_score_exists() -> None:
    for name in SCORES:
        assert get_score(name).name == name


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"keep": 0}, "keep: 0 is neither a number of layers from 1 nor a share such as 0.5"),
        ({"keep": -1}, "keep: -1 is neither"),
        ({"keep": 1.0}, "keep: 1.0 is neither"),
        ({"keep": 0.0}, "keep: 0.0 is neither"),
        ({"keep": True}, "keep: True is neither"),
        ({"keep": "half"}, "keep: 'half' is neither"),
        ({"keep": float("nan")}, "keep: nan is neither"),
        ({"keep": 1025}, "keep: 1025 is neither"),
        (
            {"score": "laziest"},
            "score: 'laziest' is not one of lighttransfer, residual-error, discarded-mass",
        ),
        ({"score": None}, "score: None is not one of"),
        ({"decide": "never"}, "decide: 'never' is not one of prompt, first-chunk"),
        ({"last_queries": 0}, "last_queries: 0 is not an integer from 1 to 128"),
        ({"last_queries": 129}, "last_queries: 129 is not an integer from 1 to 128"),
        ({"last_queries": 2.0}, "last_queries: 2.0 is not an integer from 1 to 128"),
        ({"kv_bytes": 0}, "kv_bytes: 0 is not an integer from 1"),
        ({"kv_bytes": 2.5}, "kv_bytes: 2.5 is not an integer"),
        ({"staging_tokens": 5000}, "lighttransfer.staging_tokens: unknown key"),
        ({"check_tables": 1}, "check_tables: 1 is not true or false"),
        ({"check_tables": "yes"}, "check_tables: 'yes' is not true or false"),
        ({"mode": "automatic"}, "mode: 'automatic' is not one of static, dynamic"),
        ({"keeps": 3}, "lighttransfer.keeps: unknown key"),
        ({"lazy_layers": "2-1"}, "lazy_layers: the range '2-1' runs backwards"),
    ],
    ids=str,
)
def test_refused_as_it_is_read(given: dict[str, Any], says: str) -> None:
    with pytest.raises(LightTransferError) as caught:
        dynamic(**given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"keep": 6}, "keep: 6 of 6 layers is 6; dynamic mode needs 1 to 5"),
        ({"keep": 7}, "keep: 7 of 6 layers is 7; dynamic mode needs 1 to 5"),
        ({"keep": 0.05}, "keep: 0.05 of 6 layers is 0; dynamic mode needs 1 to 5"),
        ({"keep": 0.95}, "keep: 0.95 of 6 layers is 6; dynamic mode needs 1 to 5"),
        ({"lazy_layers": "random:0.05"}, "lazy_layers: random:0.05 of 6 layers is 0; 1 to 6 can be lazy"),
        (
            {"keep": 3, "lazy_layers": "1"},
            "lazy_layers: 1 layers for short prompts, but keep 3 of 6 leaves 3",
        ),
        ({"keep": 3, "lazy_layers": "1-4"}, "lazy_layers: 4 layers for short prompts, but keep 3 of 6"),
        ({"keep": 3, "lazy_layers": "4-6"}, "lazy_layers: layer 6 does not exist"),
        ({"score": "list"}, "lazy_layers: the score 'list' needs them, 1 to 5 of the layers 0 to 5"),
        ({"score": "list", "lazy_layers": "none"}, "lazy_layers: the score 'list' needs them"),
        ({"score": "list", "lazy_layers": "4-6"}, "lazy_layers: layer 6 does not exist"),
        ({"lazy_layers": "all", "keep": 3}, "lazy_layers: 6 layers for short prompts, but keep 3 of 6"),
        ({"score": "list", "lazy_layers": "random:7"}, "lazy_layers: random:7 of 6 layers is 7"),
        ({"score": "list", "lazy_layers": "0-5"}, "keep: 0 of 6 layers is 0; dynamic mode needs 1 to 5"),
        (
            {"score": "list", "lazy_layers": "1,2", "keep": 0.5},
            "lazy_layers: 2 layers in the list, but keep 0.5 of 6 leaves 3 lazy; both must agree",
        ),
    ],
    ids=str,
)
def test_refused_once_the_model_is_known(given: dict[str, Any], says: str) -> None:
    with pytest.raises(LightTransferError) as caught:
        dynamic(**given).settle(6)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"keep": 3},
        {"score": "list"},
        {"decide": "first-chunk"},
        {"last_queries": 8},
        {"check_tables": True},
    ],
    ids=str,
)
def test_static_mode_refuses_what_is_dynamic_modes(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(LightTransferError, match=f"lighttransfer.{name}: only with mode 'dynamic'"):
        LightTransferConfig.from_dict({"lazy_layers": "1-3", **given})
    defaults = {name: LightTransferConfig.__dataclass_fields__[name].default}
    assert LightTransferConfig.from_dict({"lazy_layers": "1-3", **defaults}).lazy_layers == (1, 2, 3)


def test_static_mode_does_not_look_at_keep() -> None:
    config = LightTransferConfig((1, 2, 3, 4))
    assert config.settle(6) == config
    with pytest.raises(LightTransferError, match="layer 4 does not exist"):
        config.settle(4)


def test_where_a_first_chunk_may_be_decided() -> None:
    """How long a prefix waits else is a matter of memory (test_sizes.py)."""
    assert dynamic(decide="first-chunk").decide_tokens == 1024 + 128
    assert dynamic(decide="first-chunk", sink_tokens=4, recent_tokens=60).decide_tokens == 64 + 128


@pytest.mark.parametrize(
    ("given", "memory", "context", "limit"),
    [
        # Memory for 60,000 tokens in all four layers: as long as the context, and as the memory.
        ({}, 60_000, 4096, 4096),
        ({}, 60_000, 131072, 60_000 - 2 - 512 - 4),
        ({}, 6_000, 131072, 6_000 - 2 - 512 - 4),
        # At least as much as is needed to tell layers apart.
        ({}, 1_200, 1_100, 1024 + 32),
        ({"decide": "first-chunk"}, 60_000, 4096, 1024 + 128 - 1),
        ({"decide": "first-chunk", "recent_tokens": 60}, 60_000, 4096, 64 + 128 - 1),
        ({"decide": "first-chunk", "sink_tokens": 0, "recent_tokens": 1}, 60_000, 4096, 128),
    ],
    ids=str,
)
def test_how_long_a_prefix_may_stay_undecided(
    given: dict[str, Any], memory: int, context: int, limit: int
) -> None:
    """Two layers are full and two lazy; all four hold K and V of a prompt until it is decided."""
    config = dynamic(keep=2, **given).settle(4)
    sizes = size_memory(
        (2 * memory + 1) * (200 + TABLE_BYTES),
        UnitShape(2, 2),
        config,
        token_layer_bytes=100,
        page_size=1,
        chunk_tokens=512,
        context_tokens=context,
        interval=128,
        full_limit=None,
    )
    assert sizes.units == 2 * memory and sizes.demand.undecided == limit
