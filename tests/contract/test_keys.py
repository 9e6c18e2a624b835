"""SGLang's keys: which of its answers and logs would show them, and that none does with lazy layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lt_sglang.config import CONFIG_KEY
from lt_sglang.names import BACKEND, HIDDEN, KEYS
from tests.engine.environment import server_environment
from tests.engine.models import ensure_model

SECRETS = {
    "api_key": "the-clients-key",
    "admin_api_key": "the-admins-key",
    "ssl_keyfile_password": "the-password",
}

# What the launcher has when its arguments are resolved: shown is /server_info and the log, used what it does.
PROGRAM = """
import json, sys
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
from sglang.srt.utils.common import build_server_info
from sglang.srt.entrypoints.engine import _server_args_for_logging
load_plugins()
args = prepare_server_args(sys.argv[1:])
args.resolve_once()
print("RESULT" + json.dumps({
    "info": json.dumps(build_server_info(args, {}), default=str),
    "log": str(_server_args_for_logging(args)),
    "used": [args.api_key, args.admin_api_key, args.ssl_keyfile_password],
}))
"""


def resolve(*argv: str) -> tuple[dict[str, object], str]:
    """What PROGRAM prints of the server arguments ``argv``, and its log."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--model-path", str(ensure_model("llama")), "--device", "cpu"]
        + ["--grammar-backend", "none", *argv],
        env=server_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT")), done.stdout + done.stderr


def test_secrets_are_shown_to_nobody(tmp_path: Path) -> None:
    assert set(SECRETS) == set(KEYS)
    pair = {name: tmp_path / name for name in ("--ssl-certfile", "--ssl-keyfile")}
    for file in pair.values():
        file.write_text("SGLang looks whether it is there")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SECRETS.items()]
    flags += [f"{flag}={file}" for flag, file in pair.items()]
    ours = ["--attention-backend", BACKEND, "--json-model-override-args"]
    found, said = resolve(*ours, json.dumps({CONFIG_KEY: {"lazy_layers": "1-3"}}), *flags)
    assert found["used"] == list(SECRETS.values()), "the server itself has them"
    for where in ("info", "log"):
        text = str(found[where])
        assert text.count(HIDDEN) >= len(SECRETS)
        assert not [value for value in SECRETS.values() if value in text], where
    assert "admin routes" not in said, "a key was given"
