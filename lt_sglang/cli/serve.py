"""``lt-sglang serve``: SGLang's own server with lazy layers.

The command line is worked out before anything heavy is imported (launch/plan.py); then this process becomes
``python -m lt_sglang.cli.server`` with SGLang's arguments.
"""

from __future__ import annotations

import os
import sys

from lt_sglang.launch import admin
from lt_sglang.launch.cpu import CPU_LIMITS
from lt_sglang.launch.options import OPTIONS_HELP, describe
from lt_sglang.launch.plan import Launch, check_ports, plan_launch
from lt_sglang.launch.ready import say
from lt_sglang.launch.weights import check_weights

HELP = f"""\
usage: lt-sglang serve [MODEL | --model-path MODEL] [--lt-...] [any SGLang flag]

Starts SGLang's server with lazy layers. Every flag that does not begin with --lt- goes to SGLang unchanged;
'python -m sglang.launch_server --help' lists them. On a machine without a GPU, SGLang runs on the CPU, within
{" ".join(part for pair in CPU_LIMITS for part in pair)}.

examples:
  lt-sglang serve                                                          a small demonstration model
  lt-sglang serve ./mistral-7b --lt-mode dynamic --context-length 16384
  lt-sglang serve ./QwQ-32B-LightTransfer --tp-size 2 --trust-remote-code  trained with lazy layers
  lt-sglang serve ./mistral-7b --lt-config calibrated.json --port 30000    lt-sglang calibrate wrote the file

{OPTIONS_HELP}

{admin.HELP}"""


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
    if launch.limits:
        lines.append(f"limited to {' '.join(launch.limits)}; give other values to change that")
    lines += launch.admin.lines(sys.stderr.isatty())
    lines.append(f"will listen on {launch.url}; once it is ready, try:")
    lines.append(f"  {launch.try_line}")
    return lines
