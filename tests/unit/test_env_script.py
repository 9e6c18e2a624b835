"""scripts/env.py: where the environment belongs, and pip's settings as uv reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import env

LISTING = """\
global.index-url='https://user:pa=ss@mirror.example/simple'
global.extra-index-url='file:///opt/one/simple\\nfile:///opt/two/simple'
global.timeout='10'
global.quiet='1'
install.timeout='20'
install.constraint='/etc/constraints.txt'
:env:.find-links='/opt/wheels /opt/more'
:env:.index-url='https://other.example/simple'
"""


def test_pips_settings_become_uvs() -> None:
    assert env.index_settings(LISTING) == {
        "UV_DEFAULT_INDEX": "https://other.example/simple",  # a variable overrides a file
        "UV_INDEX": "file:///opt/one/simple file:///opt/two/simple",
        "UV_FIND_LINKS": "/opt/wheels,/opt/more",
        "UV_CONSTRAINT": "/etc/constraints.txt",
        "UV_HTTP_TIMEOUT": "20",  # pip's section for installing overrides the one for all commands
    }


def test_no_settings() -> None:
    assert env.index_settings("") == {}


def test_a_changed_lock_gets_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_SGLANG_HOME", str(tmp_path))
    for name in ("LOCK", "NODEPS_LOCK"):
        path = tmp_path / name
        path.write_text("a==1\n", encoding="utf-8")
        monkeypatch.setattr(env, name, path)
    before = env.environment_path()
    assert before.parent == tmp_path
    assert before == env.environment_path()
    (tmp_path / "NODEPS_LOCK").write_text("a==2\n", encoding="utf-8")
    assert env.environment_path() != before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VERSION", "3.10", r"needs Python 3\.11 or 3\.12"),
        ("COMPILERS", ("no-such-compiler",), "no C compiler"),
        ("NEEDED_BYTES", 1 << 60, r"Set LT_SGLANG_HOME to a folder on a larger disk"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, message: str
) -> None:
    monkeypatch.setattr(env, name, value)
    with pytest.raises(env.BuildFailed, match=message):
        env.check_machine(tmp_path / "not" / "yet")


def test_the_lock_names_no_index() -> None:
    text = env.LOCK.read_text(encoding="utf-8") + env.NODEPS_LOCK.read_text(encoding="utf-8")
    assert "://" not in text
    assert all("==" in line for line in text.splitlines() if not line.startswith("#"))
