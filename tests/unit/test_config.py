"""lt_sglang.config: parsing, formatting, validation, messages."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from lt_sglang.config import (
    CONFIG_KEY,
    DYNAMIC_FIELDS,
    MAX_BYTES,
    MAX_TOKENS,
    LightTransferConfig,
    format_layers,
    parse_layers,
)
from lt_sglang.errors import LightTransferError
from lt_sglang.numerals import read_float, read_int


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("none", ()),
        ("", ()),
        ("  ", ()),
        ("0", (0,)),
        ("5-7", (5, 6, 7)),
        ("7-7", (7,)),
        ("9, 5-7 ,11", (5, 6, 7, 9, 11)),
        ("30-33,5-6", (5, 6, 30, 31, 32, 33)),
    ],
)
def test_parse(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "5-",
        "-5",
        "5--7",
        "5-7-9",
        "7-5",
        "5,5",
        "5-7,6",
        "1.5",
        "5 6",
        ",",
        "5,",
        "0x5",
        "halves",
        "²",
        "0-999999999999",
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(LightTransferError, match="lazy_layers"):
        parse_layers(text)


def test_format_is_the_inverse_of_parse() -> None:
    rng = random.Random(1)
    for _ in range(500):
        layers = tuple(sorted(rng.sample(range(128), rng.randrange(0, 60))))
        assert parse_layers(format_layers(layers)) == layers
    assert format_layers(()) == "none"
    assert format_layers([5, 6, 7, 9]) == "5-7,9"


def random_config(rng: random.Random) -> LightTransferConfig:
    return LightTransferConfig(
        lazy_layers=tuple(sorted(rng.sample(range(80), rng.randrange(0, 80)))),
        sink_tokens=rng.choice([0, 1, 4, 129, rng.randrange(0, 5000)]),
        recent_tokens=rng.choice([1, 2, 1020, rng.randrange(1, 5000)]),
        kv_bytes=rng.choice([None, 1, rng.randrange(1, MAX_BYTES)]),
        source=rng.choice(["flags", "file"]),
    )


def test_dict_and_json_round_trip() -> None:
    rng = random.Random(2)
    for _ in range(300):
        config = random_config(rng)
        assert LightTransferConfig.from_dict(config.to_dict()) == config
        text = json.dumps(
            rng.choice([config.to_dict(), {CONFIG_KEY: config.to_dict(), "model_type": "llama"}])
        )
        assert LightTransferConfig.from_json(text, source=config.source) == config


def test_derived_sizes() -> None:
    rng = random.Random(3)
    for _ in range(300):
        config = random_config(rng)
        assert config.lazy_tokens == config.sink_tokens + config.recent_tokens
        # Nothing may be freed before every sink position was computed, and one earlier token must be kept.
        assert config.retained_tokens >= max(config.sink_tokens, config.recent_tokens, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "automatic"),
        ("mode", None),
        ("sink_tokens", -1),
        ("sink_tokens", 4.0),
        ("sink_tokens", True),
        ("sink_tokens", "4"),
        ("sink_tokens", MAX_TOKENS + 1),
        ("recent_tokens", 0),
        ("recent_tokens", None),
        ("kv_bytes", 0),
        ("kv_bytes", "many"),
        ("kv_bytes", MAX_BYTES + 1),
        ("expected_tokens", 8192),
        ("lazy_layers", "5-"),
        ("lazy_layers", 5),
        ("lazy_layers", None),
        ("lazy_layers", [1, "2"]),
        ("lazy_layers", [1, True]),
        ("lazy_layers", [1, 1]),
        ("lazy_layers", [-1]),
        ("lazy_leyers", "5"),
    ],
)
def test_every_message_names_the_field(field: str, value: Any) -> None:
    data = {"lazy_layers": "1-3", field: value}
    with pytest.raises(LightTransferError, match=field) as caught:
        LightTransferConfig.from_dict(data)
    assert "\n" not in str(caught.value)


def test_kv_bytes_may_be_left_out() -> None:
    for value in (None, 1, MAX_BYTES):
        assert LightTransferConfig.from_dict({"lazy_layers": "1", "kv_bytes": value}).kv_bytes == value


def test_lazy_layers_are_required() -> None:
    with pytest.raises(LightTransferError, match=r"lazy_layers: missing"):
        LightTransferConfig.from_dict({"sink_tokens": 4})


def test_lists_are_sorted_and_notes_are_ignored() -> None:
    config = LightTransferConfig.from_dict({"lazy_layers": [3, 1], "_comment": "why"}, source="file")
    assert config.lazy_layers == (1, 3)
    assert config.source == "file"


@pytest.mark.parametrize("data", [[], "5-24", 5, None])
def test_not_an_object(data: Any) -> None:
    with pytest.raises(LightTransferError, match="must be an object"):
        LightTransferConfig.from_dict(data)


def test_bad_json_names_the_file() -> None:
    with pytest.raises(LightTransferError, match=r"lt\.json: not valid JSON"):
        LightTransferConfig.from_json("{", source="lt.json")


def test_constructor_wants_sorted_unique_layers() -> None:
    for layers in ((2, 1), (1, 1)):
        with pytest.raises(LightTransferError, match="sorted and unique"):
            LightTransferConfig(lazy_layers=layers)


def test_layers_must_exist_in_the_model() -> None:
    config = LightTransferConfig(lazy_layers=(1, 31))
    config.check_model(32)
    with pytest.raises(LightTransferError, match=r"layer 31 does not exist, the model has layers 0 to 30"):
        config.check_model(31)
    LightTransferConfig(lazy_layers=()).check_model(1)


@pytest.mark.parametrize("text", ["5-２４", "٣", "１,2", "5–24", "1_0", "+3", "²", "9" * 19, "9" * 5000])
def test_layers_are_ascii_digits(text: str) -> None:
    with pytest.raises(LightTransferError, match=r"^lazy_layers: .* is neither a layer \(7\) nor a range"):
        parse_layers(text)


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("007", 7), ("9" * 18, 10**18 - 1)])
def test_integers_are_read(text: str, number: int) -> None:
    assert read_int(text) == number


@pytest.mark.parametrize("text", ["", " 1", "1 ", "-1", "+1", "1_0", "１", "١", "²", "1.0", "0x1", "9" * 19])
def test_other_integers_are_not(text: str) -> None:
    assert read_int(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("1e-3", 0.001), ("-2", -2.0), ("+2E2", 200.0)],
)
def test_numbers_are_read(text: str, number: float) -> None:
    assert read_float(text) == number


@pytest.mark.parametrize("text", ["", ".", "e3", "0,5", "０.5", "1_0", "nan", "inf", "1e999", " 1", "0x1p3"])
def test_other_numbers_are_not(text: str) -> None:
    assert read_float(text) is None


def test_every_field_travels_to_other_processes() -> None:
    fields = set(LightTransferConfig.__dataclass_fields__) - {"choice"}  # a pattern travels as lazy_layers
    assert set(LightTransferConfig((1,), mode="dynamic").to_dict()) == fields
    assert set(LightTransferConfig((1,)).to_dict()) == fields - set(DYNAMIC_FIELDS)
