"""What ``lt-sglang serve`` finds out before it becomes the server: ports, weights, heads."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lt_sglang.cli import main
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.plan import check_ports

from .test_cli_serve import CONFIG, Fake


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        yield holder.getsockname()[1]


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "TAKEN"],
        ["--port", "TAKEN", "--host", "0.0.0.0"],
        ["--nccl-port", "TAKEN"],
        ["--dist-init-addr", "127.0.0.1:TAKEN"],
        ["--nccl-init-addr", "127.0.0.1:TAKEN"],
        ["--grpc-port", "TAKEN"],
    ],
    ids=lambda flags: flags[0] + (flags[-1] if len(flags) > 2 else ""),
)
def test_a_taken_port_ends_the_start(flags: list[str], taken: int) -> None:
    given = [word.replace("TAKEN", str(taken)) for word in flags]
    ports = given if given[0] == "--port" else ["--port", str(free()), *given]
    launch = Fake().launch("m", "--lt-lazy-layers=1", *ports)
    name = "--dist-init-addr" if given[0] == "--nccl-init-addr" else given[0]
    with pytest.raises(
        LightTransferError, match=f"^{name} {taken}: process {os.getpid()} .* uses it already"
    ):
        check_ports(launch)


def test_free_ports_pass(taken: int) -> None:
    own = ["m", "--lt-lazy-layers=1", "--port", str(free())]
    check_ports(Fake().launch(*own))
    # Nobody listens on --nccl-port beside --dist-init-addr, nor on the latter on another node.
    other = ["--dist-init-addr", f"127.0.0.1:{free()}", "--nccl-port", str(taken)]
    check_ports(Fake().launch(*own, *other))
    node = ["--dist-init-addr", f"127.0.0.1:{taken}", "--nnodes", "2", "--node-rank", "1"]
    check_ports(Fake().launch(*own, *node))


def test_one_port_for_two_things() -> None:
    port = str(free())
    launch = Fake().launch("m", "--lt-lazy-layers=1", "--port", port, "--nccl-port", port)
    with pytest.raises(LightTransferError, match=f"^--port {port}: --nccl-port is the same port"):
        check_ports(launch)


@pytest.mark.parametrize("address", ["here", "127.0.0.1:", "127.0.0.1:70000", "127.0.0.1:１２３４"])
def test_a_bad_rendezvous_address(address: str) -> None:
    launch = Fake().launch("m", "--lt-lazy-layers=1", "--port", str(free()), "--dist-init-addr", address)
    with pytest.raises(LightTransferError, match=r"^--dist-init-addr: .* is not HOST:PORT"):
        check_ports(launch)


def test_serve_says_so_in_one_sentence(
    taken: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before it becomes the server, and nothing is announced."""
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("the server was started"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    argv = ["serve", str(tmp_path), "--lt-lazy-layers", "1", "--device", "cuda", "--port", str(taken)]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lt-sglang: --port {taken}: process ") and error.count("\n") == 1


def test_serve_looks_at_the_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("the server was started"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    argv = ["serve", str(tmp_path), "--lt-lazy-layers", "1", "--device", "cuda", "--port", str(free())]
    assert main(argv) == 2
    assert (
        capsys.readouterr().err == f"lt-sglang: {tmp_path}: has no weights (*.safetensors, *.bin or *.pt)\n"
    )


@pytest.mark.parametrize(("tp", "fits"), [(1, True), (2, True), (3, False), (8, True), (16, False)])
def test_heads_are_dealt_out_evenly(tp: int, fits: bool) -> None:
    """8 heads, 2 KV heads: more ranks than KV heads hold copies. On a CPU, SGLang pads heads."""
    config = {**CONFIG, "num_attention_heads": 8, "num_key_value_heads": 2}
    argv = ("m", "--lt-lazy-layers=1", "--tp-size", str(tp))
    if fits:
        Fake(config=config).launch(*argv)
    else:
        with pytest.raises(LightTransferError, match=f"^--tp-size {tp}: does not divide the model's 8 heads"):
            Fake(config=config).launch(*argv)
    assert Fake(config=config, gpu=False).launch(*argv).on_cpu
    with pytest.raises(LightTransferError, match="--tp-size 4: neither divides the model's 6 KV heads"):
        Fake(config={**config, "num_attention_heads": 24, "num_key_value_heads": 6}).launch(
            "m", "--lt-lazy-layers=1", "--tp-size", "4"
        )
