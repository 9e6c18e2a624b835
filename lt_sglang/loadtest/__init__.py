"""Load tests with locust and comparisons with stock SGLang; needs the extra ``loadtest``."""

from __future__ import annotations

from pathlib import Path


def locustfile_path() -> Path:
    """The file for ``locust -f``."""
    return Path(__file__).with_name("locustfile.py")
