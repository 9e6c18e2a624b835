"""argparse with our error contract."""

from __future__ import annotations

import argparse
import datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

from lt_sglang.errors import LightTransferError
from lt_sglang.numerals import read_float, read_int


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises LightTransferError where the stock one prints its usage and exits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise LightTransferError; ``main`` prints it as one line."""
        raise LightTransferError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """An integer from 1, for ``type=``."""
    number = read_int(text)
    if number is None or number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1")
    return number


def numbers(text: str) -> tuple[int, ...]:
    """Integers from 1 with commas between, for ``type=``."""
    return tuple(positive(part.strip()) for part in text.split(","))


def seed(text: str) -> int:
    """An integer from 0, for ``type=``."""
    number = read_int(text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0")
    return number


def port(text: str) -> int:
    """A TCP port, for ``type=``."""
    number = read_int(text)
    if number is None or not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to 65535")
    return number


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
    value = read_float(text)
    if value is None or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    """A number between 0 and 1, for ``type=``."""
    value = read_float(text)
    if value is None or not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return value
