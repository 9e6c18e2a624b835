"""lt_sglang.launch.lifeline: nothing outlives the process that started it, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lt_sglang.cli import INTERRUPTED
from lt_sglang.doctor import PLUGIN_VALUE
from lt_sglang.launch.lifeline import ORPHANED, PARENT_VARIABLE
from lt_sglang.launch.processes import kill_tree, spawn

from ..engine.environment import write_plugin

REPOSITORY = Path(__file__).resolve().parents[2]

# What a spawned process imports before it runs: half a minute of it, as SGLang's take.
SLOW = """\
import os, pathlib, time
pathlib.Path("child").write_text(str(os.getpid()))
time.sleep(120)

def target():
    pass
"""

# A main module like SGLang's: it spawns a process, and waits.
SPAWNER = """\
import multiprocessing, pathlib, sys

class Target:
    def __call__(self):
        pass
    def __reduce__(self):
        return __import__, ("slow_imports",)

def main():
    process = multiprocessing.get_context("spawn").Process(target=Target())
    process.start()
    process.join()

if __name__ == "__main__":
    main()
"""

# As much of SGLang as lt_sglang.cli.server asks for.
FAKE_SGLANG = {
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/plugins.py": "def load_plugins(): pass\n",
    "sglang/srt/utils.py": (
        "import psutil\n\n"
        "def kill_process_tree(pid, include_parent):\n"
        "    [child.kill() for child in psutil.Process(pid).children(recursive=True)]\n"
    ),
    "sglang/srt/server_args.py": "def prepare_server_args(argv): return argv\n",
    "sglang/launch_server.py": "import spawner\n\ndef run_server(args): spawner.main()\n",
}

# Somebody else's main module, and a process that our plug-in is loaded into once it has imported.
LATE = """\
import pathlib, time
from lt_sglang.launch.lifeline import end_if_orphaned

def target():
    pathlib.Path("child").write_text(str(__import__("os").getpid()))
    while not pathlib.Path("go").exists():
        time.sleep(0.02)
    end_if_orphaned()
    pathlib.Path("outlived").touch()
"""
LATE_SPAWNER = """\
import multiprocessing

if __name__ == "__main__":
    import late
    multiprocessing.set_start_method("spawn")
    process = multiprocessing.Process(target=late.target)
    process.start()
    process.join()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"slow_imports.py": SLOW, "spawner.py": SPAWNER, "late.py": LATE, "late_spawner.py": LATE_SPAWNER}
    for name, text in {**files, **FAKE_SGLANG}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_plugin(tmp_path, "lighttransfer", PLUGIN_VALUE)
    return tmp_path


@pytest.fixture
def started(folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        kill_tree(process)
    if (folder / "child").exists() and psutil.pid_exists(child := int((folder / "child").read_text())):
        os.kill(child, signal.SIGKILL)


def start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    env.pop(PARENT_VARIABLE, None)
    env.pop("LT_SGLANG_URL", None)
    # Whoever runs the tests in the background may ignore them, which a child would inherit.
    ignored = [one for one in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(one) == signal.SIG_IGN]
    for one in ignored:
        signal.signal(one, signal.SIG_DFL)
    try:
        return spawn([sys.executable, "-m", *command], env, folder / "log")
    finally:
        for one in ignored:
            signal.signal(one, signal.SIG_IGN)


def wait_for(what: object, seconds: float, folder: Path) -> None:
    deadline = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        log = (folder / "log").read_text() if (folder / "log").exists() else ""
        assert time.monotonic() < deadline and "Error" not in log and "lt-sglang:" not in log, log[-3000:]
        time.sleep(0.02)


def child_of(folder: Path) -> psutil.Process:
    wait_for(lambda: (folder / "child").exists() and (folder / "child").read_text(), 60, folder)
    return psutil.Process(int((folder / "child").read_text()))


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda how: how.name)
@pytest.mark.parametrize(
    "command", [("lt_sglang.launch.tied", "spawner"), ("lt_sglang.cli.server",)], ids=["stock", "ours"]
)
def test_a_killed_start_leaves_nothing(
    command: tuple[str, ...],
    how: signal.Signals,
    folder: Path,
    started: list[subprocess.Popen[bytes]],
) -> None:
    """The spawned process is still importing: SGLang's own request to the kernel is yet to come."""
    process = start(folder, *command)
    started.append(process)
    child = child_of(folder)
    assert not gone(child)
    os.kill(process.pid, how)  # this process alone, not its group
    process.wait(20)
    wait_for(lambda: gone(child), 5, folder)


def test_ctrl_c_ends_a_start_without_tracebacks(folder: Path, started: list[subprocess.Popen[bytes]]) -> None:
    """A terminal sends it to all processes at once; the first says so and ends the others."""
    process = start(folder, "lt_sglang.cli.server")
    started.append(process)
    child = child_of(folder)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == INTERRUPTED
    assert gone(child)
    log = (folder / "log").read_text()
    assert "Traceback" not in log and log.splitlines()[-1] == "lt-sglang: stopped"


def test_the_processes_of_a_killed_command_end_with_it(
    folder: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    """bench, eval, soak: the command that started the engine is killed, and so is all that it started."""
    script = (
        "import os, pathlib, sys, time\n"
        "from lt_sglang.launch.processes import spawn\n"
        "spawn([sys.executable, '-m', 'lt_sglang.launch.tied', 'spawner'], os.environ, pathlib.Path('log'))\n"
        "time.sleep(120)\n"
    )
    (folder / "command.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}
    env.pop(PARENT_VARIABLE, None)
    process = subprocess.Popen([sys.executable, "command.py"], cwd=folder, env=env, start_new_session=True)
    started.append(process)
    child = child_of(folder)
    server = child.parent()
    assert server is not None and server.pid != process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    wait_for(lambda: gone(server) and gone(child), 5, folder)


def test_the_plug_in_ends_a_process_whose_parent_is_gone(
    folder: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    """Under somebody else's main module, such as sglang.launch_server's, it outlives its parent till then."""
    process = start(folder, "late_spawner")
    started.append(process)
    child = child_of(folder)
    process.kill()
    process.wait(20)
    time.sleep(0.3)
    assert not gone(child), "the premise: nothing has tied it to its parent yet"
    (folder / "go").touch()
    wait_for(lambda: gone(child), 5, folder)
    assert not (folder / "outlived").exists()


def test_a_process_with_its_parent_goes_on(folder: Path, started: list[subprocess.Popen[bytes]]) -> None:
    process = start(folder, "late_spawner")
    started.append(process)
    child_of(folder)
    (folder / "go").touch()
    assert process.wait(20) == 0
    assert (folder / "outlived").exists()


def test_a_parent_that_died_before_is_noticed() -> None:
    code = "from lt_sglang.launch.lifeline import die_with; import os; die_with({}); print('goes on')"
    for parent, status, said in (("os.getppid()", 0, "goes on\n"), ("os.getpid()", ORPHANED, "")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(parent)], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (status, said)
