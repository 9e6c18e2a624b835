"""argparse with our error contract."""

from __future__ import annotations

import argparse
import datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

from lt_sglang.errors import LightTransferError


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises LightTransferError where the stock one prints its usage and exits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise LightTransferError; ``main`` prints it as one line."""
        raise LightTransferError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """An integer from 1, for ``type=``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1")
    return int(text)


def port(text: str) -> int:
    """A TCP port, for ``type=``."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to 65535")
    return int(text)


def url(text: str) -> str:
    """An address of HTTP, for ``type=``."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address such as http://127.0.0.1:30000")
    return text.rstrip("/")


def iso_date(text: str) -> str:
    """A day, for ``type=``."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day such as 2026-01-31") from None


def positive_float(text: str) -> float:
    """A finite number above 0, for ``type=``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
