"""The lazy ratio of LightTransfer (arXiv 2410.13846)."""

from __future__ import annotations

import torch

from lt_sglang.identify.scores.attend_kernel import attend
from lt_sglang.identify.scores.base import Score
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.identify.scores.mass_kernel import mean_mass
from lt_sglang.identify.scores.reference import masses, present


class LightTransfer(Score):
    """Mean over heads and queries of the attention weight on the selected keys.

    Read off full attention's log-sum-exp, never by a second pass over all keys.
    """

    name = "lighttransfer"

    def reference(self, evidence: Evidence) -> torch.Tensor:
        queries = present(evidence).sum(1)
        return evidence.reduce(masses(evidence).sum((1, 2)) / (queries * evidence.total_heads))

    def fused(self, evidence: Evidence) -> torch.Tensor:
        return evidence.reduce(mean_mass(evidence, attend(evidence, with_values=False)))
