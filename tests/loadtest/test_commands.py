"""The commands: locust's web page, a bad scenario, a server that is not there."""

from __future__ import annotations

import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import requests

import lt_sglang.bench
import lt_sglang.cli.bench
from lt_sglang.bench import compare
from lt_sglang.bench.outcome import read_summary
from lt_sglang.bench.scenario_file import load_scenarios
from lt_sglang.cli import main
from lt_sglang.cli.run_options import check_side
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.options import take_options
from lt_sglang.launch.processes import free_port

from ..http_server import serving
from .runs import REPOSITORY, run, scenario, write
from .slow_server import Delays, serve


def test_a_run_from_locust_s_web_page(tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "out"
    file = write(tmp_path, scenario())
    with serve(Delays(first=0.02, between=0.01)) as url:
        command = [sys.executable, "-m", "lt_sglang", "loadtest", str(file), "--url", url]
        command += ["--web-port", str(port), "--out", str(out)]
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                page = f"http://127.0.0.1:{port}"
                wait_for(lambda: requests.get(page, timeout=2).ok)
                requests.post(f"{page}/swarm", data={"host": url}, timeout=10).raise_for_status()
                wait_for(lambda: (out / "report.html").is_file())
                stats = requests.get(f"{page}/stats/requests", timeout=5).json()["stats"]
            finally:
                process.terminate()
                process.wait(timeout=20)
    assert read_summary(out)["summary"]["completed"] == 8
    counted = {row["method"]: row["num_requests"] for row in stats}
    assert counted["POST"] == counted["TTFT"] == 8


def wait_for(what: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if what():  # type: ignore[operator]
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.3)
    raise AssertionError("not within the time given")


def test_a_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, scenario())
    assert main(["loadtest", str(file), "--url", "http://127.0.0.1:9", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "--url http://127.0.0.1:9: no connection (" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_server_that_hangs_up(tmp_path: Path) -> None:
    load = {"kind": "closed", "users": 1, "requests": 1, "warmup": 1}
    hangs_up = type("HangsUp", (BaseHTTPRequestHandler,), {"handle": lambda _: None})
    with serving(hangs_up) as url:
        done = run(url, scenario(load=load), tmp_path)
    assert done.code == 2 and not done.out.exists()
    assert "the warm-up failed" in done.text and "no connection" in done.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["loadtest", "FILE", "--url", "http://x", "--case", "none"], "--case none: must be one of small"),
        (["loadtest", "FILE"], "--url"),
        (["loadtest", "FILE", "--url", "localhost:30000"], "is not an address such as http://"),
        (["loadtest", "FILE", "--url", "http://x:99999"], "is not an address such as http://"),
        (
            ["loadtest", "FILE", "--url", "http://x", "--web-port", "70000"],
            "is not an integer from 1 to 65535",
        ),
        (["bench", "TINY", "--lt-lazy-layers", "5-99"], "--lt-lazy-layers: layer 99 does not exist"),
        (["bench", "TINY", "--date", "../x"], "is not a day such as"),
        (["bench", "TINY", "--model-path", "/none/such"], "--model-path /none/such: no such folder"),
        (["soak", "TINY"], "load.seconds: missing; give --seconds"),
        (["bench", "FILE", "--rounds", "0"], "'0' is not an integer from 1"),
        (["bench", "EMPTY"], "neither a scenario file nor a folder"),
        (["bench", "FILE"], "has no engine.shape; give --model-path"),
        (["bench", "FILE", "--baseline", "magic"], "--baseline"),
        (["soak", "FILE", "--lt-mode", "lazy"], "--lt-mode"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_bad_command_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tiny").mkdir()
    tiny = write(
        tmp_path / "tiny", scenario(engine={"shape": "tiny", "lighttransfer": {"lazy_layers": "1-3"}})
    )
    places = {"FILE": str(write(tmp_path, scenario())), "TINY": str(tiny), "EMPTY": str(tmp_path / "empty")}
    work = [] if argv[0] == "loadtest" else ["--work", str(tmp_path / "work")]
    assert main([places.get(part, part) for part in argv] + work) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_large_shape_needs_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """70B of dummy weights would be loaded into the machine's memory until there is none."""
    monkeypatch.setattr(lt_sglang.cli.bench, "has_gpu", lambda: False)
    file = write(tmp_path, scenario(engine={"shape": "llama-3-70b", "lighttransfer": {"lazy_layers": "1"}}))
    assert main(["bench", str(file), "--work", str(tmp_path / "work")]) == 2
    assert "the shape llama-3-70b needs a GPU; --rehearse" in capsys.readouterr().err


def test_a_hub_name_is_not_judged_by_the_scenarios_shape(tmp_path: Path) -> None:
    """How many layers it has is not known here, and is not what the shape in its place has."""
    engine = {"shape": "tiny", "lighttransfer": {"lazy_layers": "1-3"}}
    (found,) = load_scenarios(write(tmp_path, scenario(engine=engine)))
    options, _ = take_options(["--lt-lazy-layers", "8-23"])
    check_side(found, "org/model-of-32-layers", options, gpu=False)
    with pytest.raises(LightTransferError, match="layer 23 does not exist"):
        check_side(found, None, options, gpu=False)


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lt_sglang.bench, "EXTRA", ("locust", "no_such_package"))
    file = str(write(tmp_path, scenario()))
    for argv in (["loadtest", file, "--url", "http://x"], ["bench", file], ["soak", file]):
        assert main(argv) == 2
        assert "no_such_package: not installed; load tests need pip install" in capsys.readouterr().err


def test_ctrl_c_says_where_results_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lt_sglang.cli.bench, "check_engines", lambda _: None)
    monkeypatch.setattr(compare.Bench, "run", stopped)
    file = write(tmp_path, scenario(engine={"shape": "tiny", "lighttransfer": {"lazy_layers": "1-3"}}))
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert main(["bench", str(file), *places]) == 130
    error = capsys.readouterr().err
    assert f"measured so far is in {tmp_path / 'out'} and {tmp_path / 'work'}" in error
    assert "Traceback" not in error
