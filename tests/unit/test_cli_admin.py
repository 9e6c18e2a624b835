"""The key of SGLang's admin routes: who makes it, where it goes, what is said of it."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lt_sglang.cli import main, serve, server
from lt_sglang.errors import LightTransferError
from lt_sglang.hooks.wrappers import hide_keys
from lt_sglang.launch.admin import KEY_VARIABLE, Admin, admin_headers, choose_key, take_option
from lt_sglang.launch.plan import NO_HTTP
from lt_sglang.launch.sglang_args import SglangArgs
from lt_sglang.names import HIDDEN, KEYS

from .test_cli_serve import Fake

LAZY = ("m", "--lt-lazy-layers", "1")


def choose(*argv: str, env: dict[str, str] | None = None) -> Admin:
    leave_open, rest = take_option(list(argv))
    return choose_key(SglangArgs(rest), env or {}, leave_open, has_routes=True)


def test_a_key_is_made_for_each_start() -> None:
    first, second = Fake().launch(*LAZY), Fake().launch(*LAZY)
    keys = [launch.env[KEY_VARIABLE] for launch in (first, second)]
    assert keys[0] != keys[1] and all(len(key) >= 32 for key in keys)
    assert first.admin == Admin(keys[0], made=True)
    assert not any(keys[0] in word for word in first.argv), "the list of processes shows arguments"


@pytest.mark.parametrize("given", [["--admin-api-key", "sesame"], ["--admin-api-key=sesame"]])
def test_a_given_key_leaves_the_command_line(given: list[str]) -> None:
    launch = Fake().launch(*LAZY, *given)
    assert launch.env[KEY_VARIABLE] == "sesame" and launch.admin == Admin("sesame")
    assert not any("sesame" in word or "admin" in word for word in launch.argv)


def test_a_key_in_the_environment_is_taken() -> None:
    assert choose(env={KEY_VARIABLE: "sesame"}) == Admin("sesame")
    assert choose("--admin-api-key", "other", env={KEY_VARIABLE: "sesame"}) == Admin("other")


def test_a_key_in_a_file_is_taken(tmp_path: Any) -> None:
    (tmp_path / "server.yaml").write_text("admin-api-key: sesame\n")
    assert choose("--config", str(tmp_path / "server.yaml")) == Admin("sesame")


def test_open_on_request() -> None:
    for argv in (["--lt-admin-routes", "open"], ["--lt-admin-routes=open"]):
        launch = Fake().launch(*LAZY, *argv)
        assert launch.admin.key is None and launch.env[KEY_VARIABLE] == ""
        (line,) = launch.admin.lines(terminal=True)
        assert line == "SGLang's admin routes are open to every client: --lt-admin-routes open"
        assert not any("--lt-admin" in word for word in launch.argv)
    assert Fake().launch(*LAZY, "--lt-admin-routes", "key").admin.made


@pytest.mark.parametrize(
    ("argv", "env", "message"),
    [
        (["--lt-admin-routes", "shut"], {}, "--lt-admin-routes: 'shut' is not one of key, open"),
        (["--lt-admin-routes"], {}, "--lt-admin-routes: '' is not one of key, open"),
        (["--lt-admin-routes=key", "--lt-admin-routes=key"], {}, "--lt-admin-routes: given twice"),
        (["--lt-admin-routes=open", "--admin-api-key", "k"], {}, "--lt-admin-routes open: --admin-api-key"),
        (["--lt-admin-routes=open"], {KEY_VARIABLE: "k"}, f"--lt-admin-routes open: {KEY_VARIABLE}"),
        (["--admin-api-key", "two words"], {}, "--admin-api-key: a key is ASCII"),
        (["--admin-api-key="], {}, "--admin-api-key: a key is ASCII"),
        ([], {KEY_VARIABLE: "schlüssel"}, f"{KEY_VARIABLE}: a key is ASCII"),
        (
            ["--admin-api-key", "k", "--tokenizer-worker-num", "2"],
            {},
            "--tokenizer-worker-num: SGLang checks no key",
        ),
    ],
)
def test_what_cannot_be_is_refused(argv: list[str], env: dict[str, str], message: str) -> None:
    with pytest.raises(LightTransferError) as caught:
        choose(*argv, env=env)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        (["--grpc-port", "4000"], {}),
        ([], {"SGLANG_GRPC_PORT": "4000"}),
        (["--tokenizer-worker-num", "2"], {}),
    ],
)
def test_where_sglang_takes_no_key_it_is_said(argv: list[str], env: dict[str, str]) -> None:
    found = choose(*argv, env=env)
    assert found.key is None
    assert found.lines(terminal=False)[0].startswith(
        "SGLang's admin routes are open to every client: SGLang "
    )


def test_servers_without_routes_have_no_key() -> None:
    for argv in (["--node-rank", "1"], *([flag] for flag in NO_HTTP)):
        assert Fake().launch(*LAZY, *argv).admin == Admin()


def test_a_made_key_is_shown_on_a_terminal_alone() -> None:
    made = Admin("sesame", made=True)
    assert "sesame" in "".join(made.lines(terminal=True))
    (line,) = made.lines(terminal=False)
    assert "sesame" not in line and "--admin-api-key" in line and KEY_VARIABLE in line
    assert Admin("sesame").lines(terminal=True) == [], "who gave it knows it"


def test_no_option_of_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--shape", "mistral-7b", "--lt-admin-routes", "open"]) == 2
    assert "--lt-admin-routes: unknown option" in capsys.readouterr().err


def test_the_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.run(["--help"]) == 0
    assert "--lt-admin-routes key|open" in capsys.readouterr().out


def test_headers() -> None:
    assert admin_headers("sesame") == {"Authorization": "Bearer sesame"}
    assert admin_headers(None) == {} == admin_headers("")


@pytest.mark.parametrize("key", ["sesame", ""])
def test_the_server_takes_it_from_the_environment(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """And out of it, before a process is started that would inherit it."""
    seen: dict[str, Any] = {}

    def run_server(args: Any) -> None:
        seen.update(vars(args), inherited=os.environ.get(KEY_VARIABLE))

    fakes = {
        "sglang.srt.plugins": {"load_plugins": lambda: None},
        "sglang.srt.utils": {"kill_process_tree": lambda pid, include_parent: None},
        "sglang.srt.server_args": {"prepare_server_args": lambda argv: SimpleNamespace(argv=argv)},
        "sglang.launch_server": {"run_server": run_server},
    }
    for name, content in fakes.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lt_sglang.doctor.check_start", lambda: None)
    monkeypatch.setenv(KEY_VARIABLE, key)
    monkeypatch.delenv(server.URL_VARIABLE, raising=False)
    assert server.main(["--model-path", "m"]) == 0
    assert seen["argv"] == ["--model-path", "m"] and seen["inherited"] is None
    assert seen.get("admin_api_key") == (key or None)


@pytest.mark.parametrize(("backend", "ours"), [("lighttransfer", True), ("fa3", False)])
def test_keys_are_hidden(backend: str, ours: bool) -> None:
    """Of our own servers; a stock engine may run in the same process."""
    args = SimpleNamespace(
        attention_backend=backend, prefill_attention_backend=None, decode_attention_backend=None
    )
    shown = hide_keys(lambda args: {"port": 1, **dict.fromkeys(KEYS, "sesame")}, args)
    assert shown == {"port": 1, **dict.fromkeys(KEYS, HIDDEN if ours else "sesame")}
    assert hide_keys(lambda args: dict.fromkeys(KEYS), args) == dict.fromkeys(KEYS)
