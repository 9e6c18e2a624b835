"""Contract tests import SGLang itself. On a machine without a GPU, run them with ``make test-contract``."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keep out of the report what SGLang and its libraries warn about as they are imported."""
    for what in ("DeprecationWarning:cutlass", "DeprecationWarning:flashinfer", "UserWarning:sglang"):
        config.addinivalue_line("filterwarnings", f"ignore::{what}")
    config.addinivalue_line("filterwarnings", "ignore:builtin type Swig:DeprecationWarning")
