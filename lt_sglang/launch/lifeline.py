"""Processes that end with the one that started them, from their first line on.

SGLang's processes ask the kernel for that as well (``kill_itself_when_parent_died``), but only after half a
minute of imports, and the kernel does not report a death that came before. A server killed while it starts so
left its detokenizer behind for good, and its schedulers until they had imported.

A process that multiprocessing spawns imports its parent's main module before anything else, as
``__mp_main__``. A main module that calls :func:`tie` therefore ties every process below it. Where the main
module is somebody else's, the plug-in calls :func:`end_if_orphaned` in each process.

Imports neither torch nor sglang.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

PARENT_VARIABLE = "LT_SGLANG_PARENT"
ORPHANED = 1  # exit status

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; end now if ``parent`` has.

    parent: the process id of the one that started this one. Fit for ``preexec_fn``.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The kernel reports no death that came before the request.
    if os.getppid() != parent:
        os._exit(ORPHANED)


def tie(module_name: str) -> None:
    """Tie spawned processes to those that spawn them. Main modules call it with their ``__name__``."""
    if module_name == "__mp_main__" and (parent := os.environ.get(PARENT_VARIABLE)) is not None:
        # A terminal's Ctrl-C reaches all of them; the first ends the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_with(int(parent))
    if module_name in ("__main__", "__mp_main__"):
        os.environ[PARENT_VARIABLE] = str(os.getpid())


def end_if_orphaned() -> None:
    """As ``tie``, in a spawned process whose main module does not do so; nothing in any other process."""
    parent = multiprocessing.parent_process()
    # With another start method, the kernel may watch another process than the parent.
    spawned = multiprocessing.get_start_method(allow_none=True) == "spawn"
    if parent is not None and parent.pid is not None and spawned:
        die_with(parent.pid)
