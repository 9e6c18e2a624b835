"""``sglang.Engine`` in a program of one's own on a CPU, as README shows it, in a shell's environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .environment import server_environment
from .models import ensure_model
from .server import START_TIMEOUT

pytestmark = pytest.mark.engine

PROGRAM = """\
from lt_sglang.launch.cpu import has_gpu, use_cpu

if __name__ == "__main__":
    if not has_gpu():
        use_cpu()
    import sglang

    engine = sglang.Engine(
        model_path={model!r},
        attention_backend="lighttransfer",
        json_model_override_args='{{"lighttransfer": {{"mode": "dynamic"}}}}',
        max_total_tokens=4000,
        {more}
    )
    answer = engine.generate(
        input_ids=list(range(5, 40)), sampling_params={{"max_new_tokens": 3, "ignore_eos": True}}
    )
    print("tokens:", len(answer["output_ids"]))
    engine.shutdown()
"""
# What a shell does not have.
OURS = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS", "SGLANG_USE_CPU_ENGINE", "SGLANG_NCCL_SO_PATH")


@pytest.mark.slow
def test_an_engine_of_ones_own(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    more = 'device="cpu", dtype="float32", mem_fraction_static=0.1, sleep_on_idle=True'
    program.write_text(PROGRAM.format(model=str(ensure_model("llama")), more=more))
    env = {name: value for name, value in server_environment().items() if name not in OURS}
    done = subprocess.run(
        [sys.executable, str(program)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT,
        check=False,
    )
    assert "tokens: 3" in done.stdout, (done.stdout[-2000:], done.stderr[-3000:])
