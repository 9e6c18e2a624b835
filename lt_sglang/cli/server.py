"""The server process: ``python -m lt_sglang.cli.server`` with SGLang's arguments, nothing else.

Does what ``sglang serve`` does for a language model (sglang/cli/serve.py, _run_llm), and tells the user how
far it is. ``lt-sglang serve`` starts it; it has no options of its own. Processes that it spawns import this
module first, and end with it (launch/lifeline.py).
"""

from __future__ import annotations

import os
import sys
import threading
import time

from lt_sglang.errors import LightTransferError
from lt_sglang.launch.admin import KEY_VARIABLE
from lt_sglang.launch.lifeline import tie
from lt_sglang.launch.ready import TRY_VARIABLE, URL_VARIABLE, is_ready, say

POLL_SECONDS = 1.0
PROGRESS_SECONDS = 15.0
# A 70B model from a network disk takes long; a server that is not ready by then has other problems.
GIVE_UP_SECONDS = 3600.0

tie(__name__)


def main(argv: list[str]) -> int:
    """Serve until stopped; 2 and one line on stderr if the configuration cannot be served; 130 for Ctrl-C."""
    from lt_sglang.cli import INTERRUPTED, USAGE_ERROR, one_line
    from lt_sglang.doctor import check_start

    # Out of the environment, which every process below inherits.
    key = os.environ.pop(KEY_VARIABLE, "") or None
    url = os.environ.get(URL_VARIABLE)
    if url:
        threading.Thread(target=announce, args=(url, os.environ.get(TRY_VARIABLE)), daemon=True).start()
    try:
        check_start()
        _serve(argv, key)
    except LightTransferError as error:
        print(f"lt-sglang: {one_line(error)}", file=sys.stderr, flush=True)
        return USAGE_ERROR
    except KeyboardInterrupt:
        say("stopped")
        return INTERRUPTED
    return 0


def announce(url: str, try_line: str | None, poll_seconds: float = POLL_SECONDS) -> None:
    """Say every 15 s that the server is starting, and once that it is ready."""
    started = shown = time.monotonic()
    say("starting SGLang; its log follows")
    while (now := time.monotonic()) - started < GIVE_UP_SECONDS:
        if is_ready(url, os.getpid()):
            say(f"ready after {now - started:.0f} s on {url}")
            if try_line:
                say(f"try: {try_line}")
            return
        if now - shown >= PROGRESS_SECONDS:
            shown = now
            say(f"still starting, {now - started:.0f} s")
        time.sleep(poll_seconds)


def _serve(argv: list[str], admin_key: str | None) -> None:
    from lt_sglang.doctor import server_arguments

    args = server_arguments(argv)
    from sglang.launch_server import run_server
    from sglang.srt.utils import kill_process_tree

    if admin_key is not None:
        args.admin_api_key = admin_key
    try:
        run_server(args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
