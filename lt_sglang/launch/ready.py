"""Where a server is reached, and whether it is ready."""

from __future__ import annotations

import ssl
import sys
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from lt_sglang.launch.ports import listens

# Of the server process: where it will listen, and a command line to try it with.
URL_VARIABLE = "LT_SGLANG_URL"
TRY_VARIABLE = "LT_SGLANG_TRY"
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}


def base_url(argv: list[str], host: str | None, port: int) -> str:
    """Where this machine reaches the server SGLang starts with ``argv``."""
    secure = any(arg.partition("=")[0] == "--ssl-certfile" for arg in argv)
    name = "127.0.0.1" if host is None else ANY_ADDRESS.get(host, host)
    return f"{'https' if secure else 'http'}://{f'[{name}]' if ':' in name else name}:{port}"


def is_ready(url: str, pid: int, timeout_seconds: float = 5.0) -> bool:
    """Whether ``/ready`` answers 200, and it is process ``pid`` or one below it that listens there.

    Certificates are not verified: this asks our own server.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # No proxy: http_proxy in the environment must not catch a request to this machine.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(f"{url}/ready", timeout=timeout_seconds) as answer:
            return bool(answer.status == 200) and listens(pid, urlsplit(url).port or 0)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def say(text: str) -> None:
    """Tell who started the server; its own log goes to the same place."""
    print(f"lt-sglang: {text}", file=sys.stderr, flush=True)
