"""Load tests with locust and comparisons with stock SGLang; needs the extra ``loadtest``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lt_sglang.errors import LightTransferError

EXTRA = ("locust", "matplotlib", "pydantic", "yaml")


def check_installed() -> None:
    """Raise LightTransferError unless the packages of the extra are there."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise LightTransferError(
            f"{', '.join(missing)}: not installed; load tests need pip install 'lt-sglang[loadtest]'"
        )


def locustfile_path() -> Path:
    """The file for ``locust -f``."""
    return Path(__file__).with_name("locustfile.py")
