"""argparse with our error contract."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from lt_sglang.errors import LightTransferError


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises LightTransferError where the stock one prints its usage and exits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise LightTransferError; ``main`` prints it as one line."""
        raise LightTransferError(f"{message}; see {self.prog} --help")
