"""The residual error, weighted with the attention weight that is discarded."""

from __future__ import annotations

import torch

from lt_sglang.identify.scores.attend_kernel import attend
from lt_sglang.identify.scores.base import Score
from lt_sglang.identify.scores.discarded_mass import DiscardedMass
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.identify.scores.mass_kernel import largest_discarded_mass
from lt_sglang.identify.scores.residual_error import ResidualError
from lt_sglang.identify.scores.row_kernels import negative_ratio, output_rows


class ErrorMass(Score):
    """Minus the product of the residual error's and the discarded mass's maxima.

    The error alone overrates early layers, whose residual stream is still small; the mass alone misses what
    the discarded values do. Both come from one pass over the selected keys.
    """

    name = "error-mass"
    needs_hidden = True

    def reference(self, evidence: Evidence) -> torch.Tensor:
        return ResidualError().reference(evidence) * -DiscardedMass().reference(evidence)

    def fused(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.project is not None
        splits = attend(evidence, with_values=True)
        rows, laziness = output_rows(evidence, splits)
        negative_ratio(evidence, evidence.reduce(evidence.project(rows)), laziness)
        return laziness * evidence.reduce_max(largest_discarded_mass(evidence, splits))
