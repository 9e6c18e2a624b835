"""lt_sglang.launch.ports, with real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.launch.ports import check_port, listens


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        yield holder.getsockname()[1]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", ""])
def test_a_taken_port_is_named_with_its_holder(host: str, taken: int) -> None:
    with pytest.raises(LightTransferError) as caught:
        check_port(host, taken)
    message = str(caught.value)
    assert message.startswith(f"--port {taken}: ") and "uses it already" in message and "\n" not in message
    assert str(os.getpid()) in message


def test_a_port_is_free_once_its_holder_has_gone(taken: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    for host in ("127.0.0.1", "0.0.0.0", "localhost", ""):
        check_port(host, port)
    check_port("127.0.0.1", port, "--grpc-port")


def test_connections_that_wait_for_their_end_take_no_port() -> None:
    """A server that has just ended: its side of a connection is in TIME_WAIT."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = holder.accept()
        accepted.close()
        client.recv(1)
        client.close()
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))  # the premise
    check_port("127.0.0.1", port)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6() -> None:
    with socket.socket(socket.AF_INET6) as holder:
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        holder.bind(("::1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        for host in ("::1", "::", ""):
            with pytest.raises(LightTransferError, match="uses it already"):
                check_port(host, port)
        check_port("127.0.0.1", port)  # another port of another protocol
        assert listens(os.getpid(), port)


def test_a_host_that_is_not_this_machine() -> None:
    with pytest.raises(LightTransferError, match=r"^--host 192\.0\.2\.1: not an address of this machine"):
        check_port("192.0.2.1", 30000)
    with pytest.raises(LightTransferError, match=r"^--host no\.such\.invalid: no address"):
        check_port("no.such.invalid", 30000)


def test_who_listens(taken: int) -> None:
    assert listens(os.getpid(), taken)
    assert not listens(os.getpid(), 1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert not listens(other.pid, taken)
        other.kill()
    assert not listens(other.pid, taken), "of a process that is gone, nothing"


def test_a_descendant_counts() -> None:
    code = (
        "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(1); "
        "print(s.getsockname()[1], flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        assert listens(os.getpid(), port) and listens(child.pid, port)
        child.kill()
