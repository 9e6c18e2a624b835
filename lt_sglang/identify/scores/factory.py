"""Scores by name."""

from __future__ import annotations

from lt_sglang.errors import LightTransferError
from lt_sglang.identify.scores.base import Score
from lt_sglang.identify.scores.discarded_mass import DiscardedMass
from lt_sglang.identify.scores.error_mass import ErrorMass
from lt_sglang.identify.scores.lighttransfer import LightTransfer
from lt_sglang.identify.scores.residual_error import ResidualError
from lt_sglang.identify.scores.squeeze import Squeeze

_SCORES: dict[str, type[Score]] = {
    score.name: score for score in (LightTransfer, ResidualError, DiscardedMass, ErrorMass, Squeeze)
}
SCORES = tuple(_SCORES)


def get_score(name: str) -> Score:
    """The score a configuration names; raises LightTransferError that lists them if there is none."""
    if name not in _SCORES:
        raise LightTransferError(f"score: {name!r} is not one of {', '.join(SCORES)}")
    return _SCORES[name]()
