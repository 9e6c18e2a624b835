"""The scores by which a request's lazy layers are found while its prompt is prefilled. Imports no sglang."""

from lt_sglang.selection.base import Score
from lt_sglang.selection.evidence import Evidence
from lt_sglang.selection.factory import SCORES, get_score

__all__ = ["SCORES", "Evidence", "Score", "get_score"]
