"""``lt-sglang serve`` of the known QwQ-32B-LightTransfer, rehearsed with seeded weights of its 64 layers.

In every form that its config.json may have (known_forms.py).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lt_sglang.models import find_known

from .environment import server_environment
from .known_forms import NAME, OWN_ARCHITECTURE, OWN_TYPE, checkpoint
from .models import ensure_model
from .prompts import random_prompt
from .reference import Reference
from .server import Server, ServerSpec

pytestmark = pytest.mark.engine

NEW_TOKENS = 16
# Around 129 sinks, 1025 recent tokens, both, and a chunk of 512; the last one sees sinks and window apart.
LENGTHS = (1, 129, 130, 1026, 1154, 1155, 2300)
FLAGS = (
    *("--device", "cpu", "--dtype", "float32", "--random-seed", "1", "--skip-server-warmup"),
    *("--chunked-prefill-size", "512", "--max-total-tokens", "9000", "--mem-fraction-static", "0.3"),
)
TRUST = "--trust-remote-code"
REMEDY = ("--json-model-override-args", json.dumps({"architectures": ["Qwen2ForCausalLM"]}))


class Served(Server):
    """``lt-sglang serve FOLDER``, without any flag of lazy layers."""

    def __init__(self, folder: Path, log: Path, *flags: str) -> None:
        super().__init__(ServerSpec("known", lambda: folder, None, flags), log)

    def command(self) -> list[str]:
        """The command line that starts it."""
        return [*serve(self.spec.model(), *self.spec.flags), "--port", str(self.port)]


def serve(folder: Path | str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "lt_sglang", "serve", str(folder), *FLAGS, *flags]


def refusal(folder: Path, *flags: str) -> str:
    """The sentence that a start ends with; nothing was loaded."""
    done = subprocess.run(
        serve(folder, *flags), env=server_environment(), cwd=folder.parent, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Load weight" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1].removeprefix("lt-sglang: ")


@pytest.mark.parametrize(
    ("form", "flags"),
    [
        pytest.param("qwen2", (), id="qwen2", marks=pytest.mark.slow),
        pytest.param(OWN_TYPE, (TRUST,), id=OWN_TYPE, marks=pytest.mark.slow),
        pytest.param(OWN_ARCHITECTURE, (TRUST, *REMEDY), id=OWN_ARCHITECTURE, marks=pytest.mark.slow),
    ],
)
def test_served_by_its_name(form: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """The published list, its sinks and its window, token by token."""
    folder = checkpoint(form, tmp_path)
    known = find_known(str(folder))
    assert known is not None
    rng = random.Random(3)
    prompts = [random_prompt(length, rng) for length in LENGTHS]
    server = Served(folder, tmp_path / "log", *flags)
    server.launch()
    try:
        server.wait_until_ready()
        told = server.lighttransfer()
        outputs = [reply.tokens for reply in server.generate_all(prompts, NEW_TOKENS)]
    finally:
        server.stop()
    assert told["source"] == f"known model {NAME}", told
    assert (told["sink_tokens"], told["recent_tokens"], told["num_lazy_layers"]) == (129, 1025, 32)
    assert len({token for output in outputs for token in output}) > 50, "outputs too uniform to tell errors"
    weights = ensure_model("qwen2", layers=64)
    lazy, sinks, recent = known.config.lazy_layers, known.config.sink_tokens, known.config.recent_tokens
    Reference(weights, lazy, sinks, recent).compare(prompts, outputs).assert_equal()
    # Full attention does not pass, nor half of the sinks, nor half of the window.
    for other in (((), sinks, recent), (lazy, sinks // 2, recent), (lazy, sinks, recent // 2)):
        Reference(weights, *other).compare(prompts[-1:], outputs[-1:]).assert_differs()


def test_an_architecture_of_its_own_is_refused_with_what_serves_it(tmp_path: Path) -> None:
    """``test_served_by_its_name`` gives what is said here."""
    folder = checkpoint(OWN_ARCHITECTURE, tmp_path)
    said = refusal(folder, TRUST)
    assert said.startswith(f"{folder}: its architecture Qwen2LitTransForCausalLM is code of its own")
    assert said.endswith(f": {REMEDY[0]} '{REMEDY[1]}'")


def test_code_of_its_own_runs_only_if_it_may(tmp_path: Path) -> None:
    folder = checkpoint(OWN_TYPE, tmp_path)
    with (folder / "configuration_qwen2littrans.py").open("a") as file:
        file.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    said = refusal(folder)
    assert said.startswith(f"--trust-remote-code: {folder} cannot be read without it")
    assert not (tmp_path / "ran").exists()
