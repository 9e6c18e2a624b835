"""The command line ``lt-sglang``, one module per command. Importing it imports neither torch nor sglang."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lt_sglang import __version__
from lt_sglang.errors import LightTransferError

COMMANDS = {
    "serve": "start an SGLang server with lazy layers",
    "plan": "how many requests fit, at which length, and the gain to expect",
    "loadtest": "send a scenario's traffic to a running server, with locust",
    "bench": "compare stock SGLang with lazy layers on this machine",
    "soak": "load a server for a long time: speed, memory, leaks",
    "doctor": "check this machine and a configuration without starting a server",
    "models": "list the models whose lazy layers are known",
    "calibrate": "choose a model's lazy layers by samples of your traffic",
    "train": "fine-tune a model for its lazy layers",
    "eval": "what lazy layers cost, against full attention",
}

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0: done, 1: a check failed, 2: a bad request (one line on stderr)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except LightTransferError as error:
        print(f"lt-sglang: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        # `lt-sglang plan | head` is not an error; devnull keeps the interpreter's own flush quiet.
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED


def one_line(error: BaseException) -> str:
    """The message of ``error`` without line breaks."""
    return " ".join(str(error).split())


def usage() -> str:
    """The help of ``lt-sglang`` itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lt-sglang COMMAND [options]",
            "",
            *lines,
            "",
            "lt-sglang COMMAND --help shows a command's options.",
        ]
    )


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] in ("--version", "-V"):
        print(f"lt-sglang {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise LightTransferError(f"{arguments[0]}: unknown command, choose from {', '.join(COMMANDS)}")
    # Late, so that one command does not pay for another's imports.
    module = importlib.import_module(f"lt_sglang.cli.{arguments[0]}")
    return int(module.run(arguments[1:]))
