"""A server that imports and then waits: most of a start is importing, and that needs no GPU.

    python -m lt_sglang.launch.held MODULE ARGUMENT...

Runs ``python -m MODULE`` with SGLang's HTTP server in it; its scheduler processes go on to take the GPUs once
the file named by LT_SGLANG_HOLD is there.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOLD_VARIABLE = "LT_SGLANG_HOLD"
MODULE = "lt_sglang.launch.held"


def scheduler(*args: Any, before: Callable[[], None] | None = None, **kwargs: Any) -> Any:
    """SGLang's scheduler process, once it may go on; ``before`` is called just before."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    hold = os.environ.get(HOLD_VARIABLE)
    while hold and not Path(hold).exists():
        time.sleep(0.05)
    if before is not None:
        before()
    return run_scheduler_process(*args, **kwargs)


def main(module: str, argv: list[str]) -> None:
    """Become ``module``, with ``scheduler`` in place of SGLang's."""
    import sglang.srt.entrypoints.http_server as http_server

    http_server.launch_server = functools.partial(
        http_server.launch_server, run_scheduler_process_func=scheduler
    )
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # By its own name: child processes look the function up there.
    from lt_sglang.launch.held import main as run

    run(sys.argv[1], sys.argv[2:])
