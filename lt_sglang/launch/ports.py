"""Whether a server can listen on a port, and who listens on one. Imports neither torch nor sglang."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Any

import psutil

from lt_sglang.errors import LightTransferError


def check_port(host: str, port: int, port_flag: str = "--port", host_flag: str = "--host") -> None:
    """Raise LightTransferError, naming the flag, unless a server could listen on ``host``:``port`` now.

    host: a name or an address; empty, 0.0.0.0 and :: are all of this machine's.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise LightTransferError(f"{host_flag} {host}: no address of that name ({error})") from None
    absent: OSError | None = None
    bound = False
    for family, kind, protocol, _, address in found:
        try:
            _try(family, kind, protocol, address)
            bound = True
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise LightTransferError(_cannot(error, host, port, port_flag, host_flag)) from None
            absent = error
    # A name may have an address in a protocol that this machine does not speak.
    if absent is not None and not bound:
        raise LightTransferError(_cannot(absent, host, port, port_flag, host_flag))


def _try(family: int, kind: int, protocol: int, address: Any) -> None:
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: connections that an earlier server left in TIME_WAIT are in nobody's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(address)
        probe.listen(1)


def _cannot(error: OSError, host: str, port: int, port_flag: str, host_flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{port_flag} {port}: {_holder(port)} uses it already; end that, or choose another port"
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f"{host_flag} {host}: not an address of this machine; 0.0.0.0 is all of them"
    if error.errno == errno.EACCES:
        return f"{port_flag} {port}: this user may not listen there; choose one from 1024"
    return f"{port_flag} {port}: cannot be listened on ({error.strerror})"


def _holder(port: int) -> str:
    """Who listens on ``port``, as far as this user may see."""
    with contextlib.suppress(psutil.Error, OSError):
        for found in psutil.net_connections("tcp"):
            if _listens(found, port) and found.pid:
                return f"process {found.pid} ({psutil.Process(found.pid).name()})"
    return "another process"


def listens(pid: int, port: int) -> bool:
    """Whether process ``pid`` or a descendant of it listens on TCP port ``port``."""
    members = []
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(pid)
        members = [first, *first.children(recursive=True)]
    for member in members:
        with contextlib.suppress(psutil.Error, OSError):
            for found in member.net_connections("tcp"):
                if _listens(found, port):
                    return True
    return False


def _listens(connection: Any, port: int) -> bool:
    return connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", None) == port
