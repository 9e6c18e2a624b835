"""Run another main module so that every process it spawns ends with it.

    python -m lt_sglang.launch.tied sglang.launch_server ARGUMENT...

Runs the module's own code, unchanged, as ``python -m MODULE ARGUMENT...`` does. This file stays the main
module, though, which spawned processes import first (lifeline.py).
"""

from __future__ import annotations

import runpy
import sys

from lt_sglang.launch.lifeline import tie

tie(__name__)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
