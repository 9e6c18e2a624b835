"""SGLang's command line and server arguments, as far as lt_sglang reads or adds to them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs, prepare_server_args

from lt_sglang.errors import LightTransferError
from lt_sglang.launch import sglang_args as flags
from lt_sglang.launch.cpu import CPU_LIMITS, cpu_server_args
from lt_sglang.launch.plan import NO_HTTP, Machine, plan_launch
from lt_sglang.names import BACKEND
from lt_sglang.refusals import DYNAMIC_REFUSALS, REFUSALS, Refusal, check_server_args
from tests.engine.models import ensure_model

ALL_REFUSALS = (*REFUSALS, *DYNAMIC_REFUSALS)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    ServerArgs.add_cli_args(made)
    return made


@pytest.fixture(scope="module")
def llama_folder() -> Path:
    return ensure_model("llama")


@pytest.fixture(scope="module")
def defaults(parser: argparse.ArgumentParser) -> dict[str, Any]:
    return vars(parser.parse_args(["--model-path", "m"]))


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {option: action for action in parser._actions for option in action.option_strings}


GROUPS = [
    (name, value)
    for name, value in vars(flags).items()
    if name.isupper() and isinstance(value, tuple) and name != "KNOWN_FLAGS"
]


@pytest.mark.parametrize(("name", "spellings"), GROUPS, ids=[name for name, _ in GROUPS])
def test_spellings_of_a_flag_mean_the_same_field(
    name: str, spellings: tuple[str, ...], parser: argparse.ArgumentParser
) -> None:
    known = options(parser)
    # --tp is argparse's abbreviation, in everybody's scripts.
    declared = [spelling for spelling in spellings if spelling != "--tp"]
    assert len({known[spelling].dest for spelling in declared}) == 1
    everything = {option for option, action in known.items() if action.dest == known[declared[0]].dest}
    assert everything <= set(spellings), "SGLang has another spelling that we would not see"


def test_tp_is_short_for_tp_size(parser: argparse.ArgumentParser) -> None:
    assert parser.parse_args(["--model-path", "m", "--tp", "2"]).tp_size == 2


def test_no_flag_of_sglangs_looks_like_an_abbreviation_of_one_we_read(
    parser: argparse.ArgumentParser,
) -> None:
    for option in options(parser).keys() - set(flags.CONFIG_FILE):
        flags.SglangArgs([option, "1"])


@pytest.mark.parametrize("refusal", ALL_REFUSALS, ids=lambda refusal: refusal.field)
def test_refused_fields_and_flags_exist(
    refusal: Refusal, parser: argparse.ArgumentParser, defaults: dict[str, Any]
) -> None:
    assert refusal.field in defaults
    assert options(parser)[refusal.flag].dest == refusal.field


@pytest.mark.slow
def test_each_is_refused_once_sglang_has_resolved_it(llama_folder: Path) -> None:
    """SGLang rewrites fields before it asks us: a refusal of a field that it has reset would never fire."""
    command = [sys.executable, "-m", "tests.contract.refused_flags", str(llama_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(ALL_REFUSALS) + 1
    for flag, error in found.items():
        refused = "--attn-dp-size" if flag == "--enable-dp-attention" else flag
        assert error.startswith(f"LightTransferError: {refused}"), (flag, error)


def test_sglangs_defaults_pass(defaults: dict[str, Any]) -> None:
    check_server_args(SimpleNamespace(**{**defaults, "attention_backend": BACKEND}))


def test_defaults_of_backends_are_unset(defaults: dict[str, Any]) -> None:
    for field in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        assert defaults[field] is None
    with pytest.raises(LightTransferError):
        check_server_args(SimpleNamespace(**{**defaults, "attention_backend": "fa3"}))


def test_fields_we_read_or_declare_exist(defaults: dict[str, Any]) -> None:
    from sglang.srt.arg_groups.arg_utils import field_names

    fields = field_names(ServerArgs)
    assert {
        "attention_backend",
        "cuda_graph_config",
        "device",
        "json_model_override_args",
        "model_path",
        "radix_cache_backend",
        "revision",
        "trust_remote_code",
    } <= set(fields)
    assert json.loads(defaults["json_model_override_args"] or "{}") == {}


def test_flags_we_add_exist(parser: argparse.ArgumentParser) -> None:
    known = options(parser)
    for flag in (*(pair[0] for pair in CPU_LIMITS), *NO_HTTP, *cpu_server_args()[::2]):
        assert flag in known


def test_sglang_reads_back_what_serve_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last value counts, also when the user's came first, or stands in a file."""
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 8}))
    (tmp_path / "server.yaml").write_text("json-model-override-args: {a: 1}\nlog-level: warning\n")
    machine = Machine(has_gpu=lambda: True)
    argv = ["--config", str(tmp_path / "server.yaml"), "--model", str(tmp_path), "--lt-lazy-layers", "1-3"]
    launch = plan_launch(argv, {}, machine)
    choices = __import__("sglang.srt.arg_groups.choices", fromlist=["x"])
    monkeypatch.setattr(choices, "ATTENTION_BACKEND_CHOICES", [*choices.ATTENTION_BACKEND_CHOICES])
    choices.add_attention_backend_choices([BACKEND])
    args = prepare_server_args(list(launch.argv))
    assert args.attention_backend == BACKEND
    assert args.model_path == str(tmp_path)
    made = json.loads(args.json_model_override_args)
    assert made["a"] == 1
    assert made["lighttransfer"]["lazy_layers"] == "1-3"
