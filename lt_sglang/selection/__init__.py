"""The scores by which a request's lazy layers are found while its prompt is prefilled. Imports no sglang.

The names below are loaded at their first use: ``choices`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lt_sglang.selection.base import Score
    from lt_sglang.selection.evidence import Evidence
    from lt_sglang.selection.factory import SCORES, get_score

__all__ = ["SCORES", "Evidence", "Score", "get_score"]
_MODULES = {"SCORES": "factory", "get_score": "factory", "Evidence": "evidence", "Score": "base"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
