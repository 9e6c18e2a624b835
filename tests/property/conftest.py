"""Property tests import SGLang itself, as the contract tests do."""

from tests.contract.conftest import pytest_configure

__all__ = ["pytest_configure"]
