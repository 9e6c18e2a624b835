"""The ``--lt-*`` options: parsing, precedence, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lt_sglang.config import CONFIG_KEY, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.options import (
    LtOptions,
    describe,
    resolve_config,
    short_layers,
    take_options,
)
from lt_sglang.resolve import load_config

QWQ = "cxdu/QwQ-32B-LightTransfer"
PLAIN = {"num_hidden_layers": 8}


def options(*argv: str) -> LtOptions:
    taken, rest = take_options(list(argv))
    assert rest == []
    return taken


@pytest.mark.parametrize("equals", [True, False])
def test_both_forms_and_the_rest_in_order(equals: bool) -> None:
    def flag(name: str, value: str) -> list[str]:
        return [f"{name}={value}"] if equals else [name, value]

    argv = ["--port", "1", *flag("--lt-lazy-layers", "5-24,26"), "-x", *flag("--lt-sink-tokens", "0"), "tail"]
    taken, rest = take_options(argv)
    assert taken == LtOptions(lazy_layers="5-24,26", sink_tokens=0)
    assert rest == ["--port", "1", "-x", "tail"]


def test_every_option(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text("{}")
    expected = {
        "lazy_layers": "none",
        "config": str(file),
        "mode": "static",
        "sink_tokens": 1,
        "recent_tokens": 2,
        "kv_bytes": 3,
        "keep": 5,
        "score": "squeeze",
        "decide": "first-chunk",
        "last_queries": 8,
        "check_tables": "on",
    }
    flags = [f"--lt-{name.replace('_', '-')}" for name in expected]
    taken = options(
        *(part for flag, value in zip(flags, expected.values(), strict=True) for part in (flag, str(value)))
    )
    assert vars(taken) == {**expected, "check_tables": True}
    assert taken.given() == flags


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lt-lazy-layer", "5"], "--lt-lazy-layer: unknown option, allowed are --lt-lazy-layers"),
        (["--lt-lazy_layers", "5"], "--lt-lazy_layers: unknown option"),
        (["--lt-lazy-layers"], "--lt-lazy-layers: a value is missing"),
        (["--lt-lazy-layers="], "--lt-lazy-layers: a value is missing"),
        (["--lt-lazy-layers", "--port"], "--lt-lazy-layers: a value is missing"),
        (["--lt-lazy-layers", "5-x"], "--lt-lazy-layers: '5-x'"),
        (["--lt-lazy-layers", "1", "--lt-lazy-layers=2"], "--lt-lazy-layers: given twice"),
        (["--lt-mode", "lazy"], "--lt-mode: 'lazy' is not one of static, dynamic"),
        (["--lt-keep", "0"], "--lt-keep: '0' is neither a number of layers from 1 nor a share such as 0.5"),
        (["--lt-keep", "1.0"], "--lt-keep: '1.0' is neither"),
        (["--lt-keep", "half"], "--lt-keep: 'half' is neither"),
        (["--lt-score", "mean"], "--lt-score: 'mean' is not one of lighttransfer, residual-error"),
        (["--lt-decide", "later"], "--lt-decide: 'later' is not one of prompt, first-chunk"),
        (["--lt-check-tables", "yes"], "--lt-check-tables: 'yes' is not one of on, off"),
        (["--lt-kv-bytes", "0"], "--lt-kv-bytes: 0 is not an integer from 1 to 281474976710656"),
        (["--lt-sink-tokens", "-1"], "--lt-sink-tokens: '-1' is not an integer from 0"),
        (["--lt-recent-tokens", "0"], "--lt-recent-tokens: 0 is not an integer from 1"),
        (["--lt-recent-tokens", "1e3"], "--lt-recent-tokens: '1e3'"),
        (["--lt-recent-tokens", "²"], "--lt-recent-tokens: '²'"),
        (["--lt-kv-bytes", "4GiB"], "--lt-kv-bytes: '4GiB'"),
        (["--lt-expected-tokens", "8192"], "--lt-expected-tokens: unknown option"),
    ],
)
def test_bad_options(argv: list[str], message: str) -> None:
    with pytest.raises(LightTransferError) as caught:
        take_options(argv)
    assert message in str(caught.value)


def key(text: str, **more: Any) -> dict[str, Any]:
    return {CONFIG_KEY: {"lazy_layers": text, **more}}


def test_precedence_of_sources(tmp_path: Path) -> None:
    file = tmp_path / "lt.json"
    file.write_text(json.dumps({"lazy_layers": "2", "sink_tokens": 7}))
    from_file = f"--lt-config={file}"
    model = {**PLAIN, **key("4", recent_tokens=99)}

    def layers(
        *argv: str, overrides: dict[str, Any], config: dict[str, Any], path: str = "m"
    ) -> tuple[int, ...]:
        made = resolve_config(options(*argv), path, config, overrides)
        assert made is not None
        return made.lazy_layers

    assert layers("--lt-lazy-layers=1", from_file, overrides={}, config=model) == (1,)
    assert layers(from_file, overrides={}, config=model) == (2,)
    assert layers(overrides=key("3"), config=model) == (3,)
    assert layers(overrides={}, config=model, path=QWQ) == (4,)
    assert len(layers(overrides={}, config={"num_hidden_layers": 64}, path=QWQ)) == 32
    with pytest.raises(LightTransferError, match="give one of them"):
        resolve_config(options(from_file), "m", model, key("3"))


def test_single_values_replace_those_of_any_source(tmp_path: Path) -> None:
    made = resolve_config(options("--lt-recent-tokens", "2000"), QWQ, {"num_hidden_layers": 64}, {})
    assert made is not None
    assert (len(made.lazy_layers), made.sink_tokens, made.recent_tokens) == (32, 129, 2000)
    assert made.source == "known model QwQ-32B-LightTransfer, with --lt-recent-tokens"
    fewer = resolve_config(options("--lt-lazy-layers", "5-24"), QWQ, {"num_hidden_layers": 64}, {})
    assert fewer is not None
    assert (len(fewer.lazy_layers), fewer.sink_tokens, fewer.recent_tokens) == (20, 129, 1025)


def test_flags_alone_take_the_papers_windows() -> None:
    made = resolve_config(options("--lt-lazy-layers=1-3", "--lt-kv-bytes=99"), "m", PLAIN, {})
    expected = LightTransferConfig((1, 2, 3), kv_bytes=99, source="--lt-lazy-layers, --lt-kv-bytes")
    assert made == expected


def test_half_is_every_second_layer() -> None:
    made = resolve_config(options("--lt-lazy-layers", "half"), "m", PLAIN, {})
    assert made is not None
    assert made.lazy_layers == (1, 3, 5, 7)
    unknown = resolve_config(options("--lt-lazy-layers", "half"), "m", None, {})
    assert unknown is not None and unknown.to_dict()["lazy_layers"] == "half", "SGLang's process settles it"


def test_none_is_a_choice_too() -> None:
    made = resolve_config(options("--lt-lazy-layers", "none"), QWQ, {"num_hidden_layers": 64}, {})
    assert made is not None
    assert made.lazy_layers == ()


def test_layers_are_checked_against_the_model() -> None:
    with pytest.raises(LightTransferError, match=r"layer 8 does not exist, the model has layers 0 to 7"):
        resolve_config(options("--lt-lazy-layers", "7-8"), "m", PLAIN, {})


def test_nothing_known() -> None:
    with pytest.raises(
        LightTransferError,
        match=r"lazy layers: none are known for m. With --lt-mode dynamic .* lt-sglang calibrate",
    ):
        resolve_config(LtOptions(), "m", PLAIN, {})
    # A model that cannot be looked up here is left to SGLang's process...
    assert resolve_config(LtOptions(), "m", None, {}) is None
    # ... unless a value was given that would be lost.
    with pytest.raises(LightTransferError, match="none are known"):
        resolve_config(options("--lt-sink-tokens=4"), "m", None, {})


@pytest.mark.parametrize("overrides", [{}, key("3")])
@pytest.mark.parametrize("model", [PLAIN, {**PLAIN, **key("4")}])
@pytest.mark.parametrize("path", [QWQ, "m"])
def test_without_options_it_agrees_with_the_server(
    overrides: dict[str, Any], model: dict[str, Any], path: str
) -> None:
    deep = {**model, "num_hidden_layers": 64}
    try:
        expected = load_config(overrides, deep, path)
    except LightTransferError:
        with pytest.raises(LightTransferError):
            resolve_config(LtOptions(), path, deep, overrides)
        return
    made = resolve_config(LtOptions(), path, deep, overrides)
    assert made is not None
    assert made.to_dict() | {"source": ""} == expected.to_dict() | {"source": ""}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lazy_layers": 5}'])
def test_bad_config_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "lt.json"
    file.write_text(text)
    with pytest.raises(LightTransferError):
        resolve_config(options(f"--lt-config={file}"), "m", PLAIN, {})


def test_missing_config_file_is_named() -> None:
    with pytest.raises(LightTransferError, match=r"--lt-config /none/such\.json: cannot be read"):
        resolve_config(options("--lt-config=/none/such.json"), "m", PLAIN, {})


def test_describe_is_one_short_line() -> None:
    line = describe(LightTransferConfig(tuple(range(1, 80, 2))))
    assert line == "40 lazy layers (1,3,5,...,79), 4 sink + 1020 recent tokens; from flags"
    assert short_layers((5, 6, 7)) == "5-7"


# SGLang's flags


# The model's config.json


@pytest.mark.parametrize("flag", ["--lt-keep=0.5", "--lt-score=squeeze", "--lt-decide=first-chunk"])
def test_dynamic_options_need_dynamic_mode(flag: str) -> None:
    with pytest.raises(LightTransferError) as caught:
        resolve_config(options("--lt-lazy-layers=1", flag), "m", PLAIN, {})
    assert str(caught.value) == f"{flag.partition('=')[0]}: only with --lt-mode dynamic"


def test_dynamic_mode_needs_no_list() -> None:
    config = resolve_config(options("--lt-mode=dynamic", "--lt-keep=0.25"), "m", PLAIN, {})
    assert config is not None and config.dynamic
    assert config.keep == 2 and len(config.lazy_layers) == 6
    assert describe(config).startswith("dynamic: each request keeps 2 layers full")


def test_dynamic_mode_of_a_model_with_a_static_list() -> None:
    """The list of another mode says nothing of short prompts; its windows stay."""
    config = resolve_config(options("--lt-mode=dynamic"), QWQ, {"num_hidden_layers": 64}, {})
    assert config is not None and config.dynamic and config.keep == 32
    assert (config.sink_tokens, config.recent_tokens) == (129, 1025)
    assert config.lazy_layers != load_config({}, {}, QWQ).lazy_layers


def test_a_list_after_a_full_prefill(tmp_path: Path) -> None:
    """Named, or a static list from elsewhere, with as many full layers as it leaves."""
    asked = ("--lt-mode=dynamic", "--lt-score=list")
    config = resolve_config(options(*asked, "--lt-lazy-layers=1-3,5"), "m", PLAIN, {})
    assert config is not None and config.dynamic
    assert config.lazy_layers == (1, 2, 3, 5) and config.keep == 4
    assert describe(config).startswith("dynamic: 4 lazy layers (1-3,5), cut at each request's prompt")
    file = tmp_path / "layers.json"
    file.write_text('{"lighttransfer": {"lazy_layers": "2,4", "recent_tokens": 60}}')
    config = resolve_config(options(*asked, f"--lt-config={file}"), "m", PLAIN, {})
    assert config is not None and config.dynamic
    assert (config.lazy_layers, config.keep, config.recent_tokens) == ((2, 4), 6, 60)
    known = resolve_config(options(*asked), QWQ, {"num_hidden_layers": 64}, {})
    assert known is not None and known.lazy_layers == load_config({}, {}, QWQ).lazy_layers
    with pytest.raises(LightTransferError, match="lazy layers: none are known for m"):
        resolve_config(options(*asked), "m", PLAIN, {})
    with pytest.raises(LightTransferError, match=r"^--lt-lazy-layers: 4 layers in the list, but keep 2 of 8"):
        resolve_config(options(*asked, "--lt-lazy-layers=1-3,5", "--lt-keep=2"), "m", PLAIN, {})
    with pytest.raises(LightTransferError, match=r"but keep 0.5 of 8 leaves 4 lazy"):
        resolve_config(options("--lt-mode=dynamic", "--lt-keep=0.5", "--lt-lazy-layers=1"), "m", PLAIN, {})


def test_choices_are_lazy_layers() -> None:
    config = resolve_config(options("--lt-lazy-layers=pyramid:5"), "m", PLAIN, {})
    assert config is not None and config.mode == "static"
    assert config.lazy_layers == (3, 4, 5, 6, 7)
    config = resolve_config(options("--lt-lazy-layers=all"), "m", PLAIN, {})
    assert config is not None and config.lazy_layers == tuple(range(8))
    config = resolve_config(options("--lt-lazy-layers=1,2"), "m", PLAIN, key("ends:0.5"))
    assert config is not None and config.lazy_layers == (1, 2), "a list replaces a choice"
    config = resolve_config(options("--lt-mode=dynamic", "--lt-keep=3"), "m", PLAIN, key("random:0.5"))
    assert config is not None and len(config.lazy_layers) == 5, "dynamic mode takes no static choice over"


@pytest.mark.parametrize(
    ("flags", "model", "message"),
    [
        (["--lt-lazy-layers=7-8"], {}, "--lt-lazy-layers: layer 8 does not exist"),
        (["--lt-lazy-layers=ends:9"], {}, "--lt-lazy-layers: ends:9 of 8 layers is 9; 1 to 8 can be lazy"),
        (
            ["--lt-mode=dynamic", "--lt-keep=8"],
            {},
            "--lt-keep: 8 of 8 layers is 8; dynamic mode needs 1 to 7",
        ),
        (["--lt-sink-tokens=5"], key("8"), "the model's config.json: lazy_layers: layer 8 does not exist"),
        ([], key("8"), "the model's config.json: lazy_layers: layer 8 does not exist"),
        ([], key("5-"), "the model's config.json: lazy_layers: '5-' is neither"),
        ([], key("1", sink_tokens=-1), "the model's config.json: sink_tokens: -1 is not an integer from 0"),
    ],
)
def test_errors_name_the_flag_as_typed_or_the_file(
    flags: list[str], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(LightTransferError) as caught:
        resolve_config(options(*flags), "m", {**PLAIN, **model}, {})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["ends", "random", "pyramid", "all"])
def test_old_scores_are_refused_with_their_new_spelling(name: str) -> None:
    with pytest.raises(LightTransferError, match=f"^--lt-score: '{name}' looks at no prompt; .* as '{name}"):
        take_options(["--lt-mode=dynamic", f"--lt-score={name}"])
