"""Run a command with the environment that SGLang needs on this machine.

Usage: ``python scripts/run.py COMMAND [ARGUMENT...]``

With a GPU that is the environment as it is. Without one, tests import SGLang in their own process, and that
works only if the process was started with the CPU environment. ``lt-sglang serve`` arranges its own.
"""

from __future__ import annotations

import os
import sys

from lt_sglang.launch.cpu import CompilerMissing, cpu_environment, has_gpu


def main(command: list[str]) -> int:
    """Become ``command``; returns only on failure."""
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    env = dict(os.environ)
    if not has_gpu():
        try:
            env.update(cpu_environment(1, env))
        except CompilerMissing as error:
            print(f"run: {error}", file=sys.stderr)
            return 1
    try:
        os.execvpe(command[0], command, env)
    except OSError as error:
        print(f"run: {command[0]}: {error.strerror}", file=sys.stderr)
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
