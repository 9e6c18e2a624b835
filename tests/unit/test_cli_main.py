"""``lt-sglang``: dispatch, exit codes, one-line errors, and the commands that need no server."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lt_sglang import __version__
from lt_sglang.cli import COMMANDS, main

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


@pytest.mark.parametrize(
    "argv",
    [
        ["frobnicate"],
        ["serve", "--lt-nonsense", "1"],
        ["serve", "m", "--lt-lazy-layers", "5-"],
        ["serve", "m", "--lt-mode", "lazy"],
        ["serve", "m", "--attention-backend", "flashinfer"],
        ["serve", "m", "--json-model-override-args", "{"],
        ["serve", "m", "--lt-config", "/none/such.json"],
        ["serve", "m", "--tp", "none"],
        ["serve", "/none/such"],
        ["serve", "./none/such", "--lt-lazy-layers", "1"],
        ["serve", "m", "--lt-lazy-layers", "1", "--port", "65536"],
        ["plan"],
        ["plan", "--shape", "nobody"],
        ["plan", "--shape", "mistral-7b", "--tp", "7"],
        ["plan", "--shape", "mistral-7b", "--lengths", "1,x"],
        ["plan", "--shape", "mistral-7b", "--mix", "512+256:0.8,12000+256:0.3"],
        ["plan", "--shape", "mistral-7b", "--mix", "512:1"],
        ["plan", "--shape", "mistral-7b", "--mix", "512+256:1,"],
        ["plan", "--shape", "mistral-7b", "--mix", "32000+1000"],
        ["plan", "--shape", "mistral-7b", "--mem-fraction-static", "1.5"],
        ["plan", "--shape", "mistral-7b", "--input-tokens", "99999999"],
        ["plan", "--shape", "llama-3-70b"],
        ["plan", "--shape", "mistral-7b", "--lt-lazy-layers", "0-32"],
        ["plan", "--model-path", "/none/such", "--shape", "mistral-7b"],
        ["plan", "--shape", "mistral-7b", "--gpu", "abacus"],
        ["models", "--yaml"],
    ],
    ids=" ".join,
)
def test_a_bad_request_is_one_line_and_exit_code_2(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lt-sglang: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lt-sglang {__version__}\n"
    assert main(["--help"]) == 0
    assert all(name in capsys.readouterr().out for name in ("serve",))
    assert main([]) == 2
    for command in COMMANDS:
        try:
            code: object = main([command, "--help"])
        except SystemExit as stop:  # argparse
            code = stop.code
        assert code == 0
        assert f"usage: lt-sglang {command}" in capsys.readouterr().out


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "QwQ-32B-LightTransfer" in shown and all(len(line) <= 124 for line in shown.splitlines())
    assert "made by its authors" in shown and "question and answer of each training sample" in " ".join(
        shown.split()
    )
    assert main(["models", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["lighttransfer"]["sink_tokens"] == 129
    assert entry["made"].startswith("by its authors")


def test_plan_for_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--shape", "mistral-7b", "--lengths", "4096,16384", "--output-tokens", "256"]) == 0
    text = capsys.readouterr().out
    assert "dynamic: each request keeps 16 layers full" in text and "Quality is not in this table" in text
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:2] for row in rows if row[1] == "256"] == [["4096", "256"], ["16384", "256"]]


def test_plan_reads_the_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model-path", model, "--lt-lazy-layers", "8-23", "--input-tokens", "8192", "--json"]
    assert main(argv) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["model"]["params"] == 8_030_261_248
    assert data["lighttransfer"]["lazy_layers"] == "8-23"
    (length,) = data["lengths"]
    assert length["hybrid_requests"] > length["full_requests"] > 0
    assert 1 < length["decode_ratio"] < length["bound"] + 0.2


def test_plan_options(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def requests(*more: str) -> int:
        argv = ["plan", "--model-path", model, "--lt-lazy-layers", "half", "--input-tokens", "8192", "--json"]
        assert main([*argv, *more]) == 0
        count: int = json.loads(capsys.readouterr().out)["lengths"][0]["hybrid_requests"]
        return count

    base = requests()
    assert requests("--kv-cache-dtype", "fp8_e4m3") > 1.9 * base
    assert requests("--tp", "2") > 2 * base
    assert requests("--gpu", "h200-141") > 1.9 * base
    assert requests("--gpu-memory-gib", "40") < base / 2
    assert requests("--weights-gib", "40") < base
    assert requests("--mem-fraction-static", "0.5") < base
    assert requests("--lt-kv-bytes", str(2**34)) < base == requests("--lt-kv-bytes", str(2**40))


def test_plan_without_lazy_layers_is_of_dynamic_mode(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It says that it assumes so, and its last line serves what it counts."""
    argv = ["--lengths", "8192,16384", "--output-tokens", "256", "--tensor-parallel-size", "2"]
    assert main(["plan", model, *argv, "--enable-metrics"]) == 0
    text = capsys.readouterr().out
    assert "none are known for this model: planned in dynamic mode" in text
    assert "Passed on to serve, and not counted with: --enable-metrics." in text
    assert "Until its layers are found, a prompt holds its KV in all of them" in text
    assert text.splitlines()[-1].split() == [
        *("lt-sglang", "serve", model, "--tensor-parallel-size", "2", "--enable-metrics"),
        "--lt-mode=dynamic",
    ]


def test_the_serve_line_of_a_plan_is_planned_alike(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It repeats what was given, and what it adds changes nothing."""
    given = ["--lt-lazy-layers", "ends:0.25", "--context-length", "40000", "--kv-cache-dtype", "fp8_e4m3"]
    lengths = ["--lengths", "20000", "--json"]
    assert main(["plan", model, *given, *lengths]) == 0
    told = json.loads(capsys.readouterr().out)
    again = shlex.split(told["serve"])[2:]
    assert main(["plan", *again, *lengths]) == 0
    planned = json.loads(capsys.readouterr().out)["lengths"]
    assert [row["hybrid_requests"] for row in planned] == [row["hybrid_requests"] for row in told["lengths"]]
    assert told["lighttransfer"]["lazy_layers"] == "0-3,28-31"


def test_plan_of_a_mix(capsys: pytest.CaptureFixture[str]) -> None:
    """Its parts are the rows, unless lengths are given; what it adds is in one paragraph and in JSON."""
    argv = ["plan", "--shape", "mistral-7b", "--lt-lazy-layers", "half", "--mix", "512+256:0.8,12000+256:0.2"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:2] for row in rows if row[1] == "256"] == [["512", "256"], ["12000", "256"]]
    assert main([*argv, "--lengths", "4096", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    mix = told["mix"]
    full, hybrid = mix["full_requests"], mix["hybrid_requests"]
    assert f"Mixed (0.8 x 512 + 256, 0.2 x 12000 + 256): {full} requests run at once with full KV" in text
    assert hybrid > 1.4 * full and 1.1 < mix["total_ratio"] < mix["decode_ratio"]
    assert [row["input_tokens"] for row in told["lengths"]] == [4096] and "--mix" not in told["serve"]


def test_plan_proposes_a_number_of_full_layers(capsys: pytest.CaptureFixture[str]) -> None:
    """One that shares more layers with the lazy ones, where the given one has a small divisor."""
    plan = ["plan", "--shape", "mistral-7b", "--lt-mode", "dynamic", "--lengths", "4096", "--lt-keep"]
    assert main([*plan, "13"]) == 0
    text = capsys.readouterr().out
    assert (
        "13 full and 19 lazy layers have no common divisor above 1: each step writes 32 index lists" in text
    )
    assert "With 12 full layers it is 8." in text
    assert main([*plan, "16"]) == 0
    assert "index lists" not in capsys.readouterr().out


def test_plan_with_a_list_of_somebody_else_says_whose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--shape", "mistral-7b", "--lt-lazy-layers", "half"]) == 0
    text = capsys.readouterr().out
    assert "from --lt-lazy-layers: half (a pattern, not calibrated)" in text and "none are known" not in text


def test_plan_says_which_lengths_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--shape", "mistral-7b", "--context-length", "20000"]) == 0
    text = capsys.readouterr().out
    assert "the context has 20000 tokens (--context-length): prompts of 32768, 65536, 131072." in text
    assert main(["plan", "--shape", "mistral-7b", "--context-length", "200000"]) == 0
    assert "Left out" not in capsys.readouterr().out
    assert main(["plan", "--shape", "mistral-7b", "--lengths", "4096,40000"]) == 2
    assert "40000 + 512 tokens are more than the 32768" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "serve"])
def test_a_hub_name_without_a_network_fails_at_once(command: str) -> None:
    """One attempt, with its cause: nothing listens there. Every further one would say so in a line."""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "lt_sglang", command, "nobody/nothing"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    said = (
        "lt-sglang: --model-path nobody/nothing: no such folder, and the hub does not give its config.json: "
    )
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert "refused" in done.stderr


def test_plan_refuses_unsupported_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "kv_lora_rank": 512}))
    assert main(["plan", "--model-path", str(tmp_path), "--lt-lazy-layers", "1"]) == 2
    assert "MLA" in capsys.readouterr().err


def test_plan_stays_inside_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "max_position_embeddings": 2048}))
    argv = ["plan", "--model-path", str(tmp_path), "--lt-lazy-layers", "1", "--json"]
    assert main(argv) == 0
    (length,) = json.loads(capsys.readouterr().out)["lengths"]
    assert length["input_tokens"] + length["output_tokens"] == 2048


def test_as_a_module_without_heavy_imports() -> None:
    """``python -m lt_sglang``; a bad option must not cost the seconds that torch and SGLang take."""
    code = (
        "import sys; from lt_sglang.cli import main; code = main(['serve', 'm', '--lt-sink-tokens', 'x']); "
        "heavy = {'torch', 'sglang', 'transformers'} & set(sys.modules); sys.exit(9 if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "lt_sglang", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("lt-sglang ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("plan --shape mistral-7b --tp １", "'１' is not an integer from 1"),
        ("plan --shape mistral-7b --lengths 4096,８192", "'８192' is not an integer from 1"),
        ("plan --shape mistral-7b --mem-fraction-static ０.5", "'０.5' is not a share between 0 and 1"),
        ("plan --shape mistral-7b --gpu-memory-gib 8_0", "'8_0' is not a number above 0"),
        ("plan --shape mistral-7b --lt-lazy-layers 5-２4", "--lt-lazy-layers: '5-２4' is neither a layer"),
        ("plan --shape mistral-7b --lt-sink-tokens ٤", "--lt-sink-tokens: '٤' is not an integer from 0"),
        ("plan --shape mistral-7b --lt-mode dynamic --lt-keep ０.5", "--lt-keep: '０.5' is neither a number"),
        ("serve m --lt-lazy-layers 1 --port ３0000", "--port: '３0000' is not an integer from 1"),
        ("serve m --lt-lazy-layers 1 --tp-size ２", "--tp-size: '２' is not an integer from 1"),
        ("bench f --rounds １", "'１' is not an integer from 1"),
        ("bench f --limit-s ６0", "'６0' is not a number above 0"),
        ("soak f --seconds nan", "'nan' is not a number above 0"),
        ("loadtest f --url http://h --web-port ８089", "'８089' is not an integer from 1 to 65535"),
        ("eval --engine a --out o --seed ٤", "'٤' is not an integer from 0"),
        ("eval --engine a --out o --margin ０.1", "'０.1' is not a share between 0 and 1"),
        ("calibrate --model-path m --data d --out o --seed 1_0", "'1_0' is not an integer from 0"),
    ],
)
def test_numbers_are_written_in_ascii(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``int`` and ``str.isdecimal`` take every script's digits, which no flag of SGLang's would get alike."""
    assert main(argv.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_number_of_thousands_of_digits(capsys: pytest.CaptureFixture[str]) -> None:
    """More than Python turns into an integer."""
    assert main(["plan", "--shape", "mistral-7b", "--tp", "9" * 5000]) == 2
    assert "is not an integer from 1" in capsys.readouterr().err
