"""The largest attention weight that a lazy layer would discard."""

from __future__ import annotations

import torch

from lt_sglang.identify.scores.attend_kernel import attend
from lt_sglang.identify.scores.base import Score
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.identify.scores.mass_kernel import largest_discarded_mass
from lt_sglang.identify.scores.reference import masses, present


class DiscardedMass(Score):
    """Minus the maximum over heads and queries of the attention weight outside the selected keys.

    The mean of the paper's ratio hides a head that retrieves on a few queries; a maximum does not.
    """

    name = "discarded-mass"

    def reference(self, evidence: Evidence) -> torch.Tensor:
        discarded = (1.0 - masses(evidence)).masked_fill(~present(evidence)[:, :, None], 0.0)
        if evidence.heads == 0:
            return -evidence.reduce_max(discarded.new_zeros(len(discarded)))
        return -evidence.reduce_max(discarded.amax((1, 2)))

    def fused(self, evidence: Evidence) -> torch.Tensor:
        splits = attend(evidence, with_values=False)
        return -evidence.reduce_max(largest_discarded_mass(evidence, splits))
