"""``lt-sglang serve``: SGLang's own server with lazy layers.

The command line is worked out before anything heavy is imported (launch/plan.py); then this process becomes
``python -m lt_sglang.cli.server`` with SGLang's arguments.
"""

from __future__ import annotations

import os
import sys

from lt_sglang.launch import admin
from lt_sglang.launch.options import OPTIONS_HELP, describe
from lt_sglang.launch.plan import Launch, check_ports, plan_launch
from lt_sglang.launch.ready import say
from lt_sglang.launch.weights import check_weights

HELP = f"""\
usage: lt-sglang serve [MODEL | --model-path MODEL] [--lt-...] [any SGLang flag]

Starts SGLang's server with lazy layers. Every flag that does not begin with --lt- goes to SGLang unchanged;
'python -m sglang.launch_server --help' lists them. On a machine without a GPU, SGLang runs on the CPU, and
without a model it serves a small demonstration model there.

{OPTIONS_HELP}

{admin.HELP}

examples:
  lt-sglang serve cxdu/QwQ-32B-LightTransfer --tp-size 2
  lt-sglang serve --model-path ./mistral-7b --lt-lazy-layers 8-23 --lt-expected-tokens 16384 --port 30000
  lt-sglang serve"""


def run(argv: list[str]) -> int:
    """Become the server; returns only for --help."""
    if any(arg in ("-h", "--help") for arg in argv):
        print(HELP)
        return 0
    launch = plan_launch(argv, os.environ)
    check_ports(launch)
    check_weights(launch.args)
    for line in _greeting(launch):
        say(line)
    sys.stdout.flush()
    os.execve(sys.executable, launch.command, launch.env)


def _greeting(launch: Launch) -> list[str]:
    lines = [f"model: {launch.model_path}"]
    if launch.config is not None:
        lines.append(describe(launch.config))
    if launch.on_cpu:
        lines.append("no GPU in use: SGLang runs on the CPU (for tests and demonstrations; it is slow)")
    lines += launch.admin.lines(sys.stderr.isatty())
    lines.append(f"will listen on {launch.url}; once it is ready, try:")
    lines.append(f"  {launch.try_line}")
    return lines
