"""SqueezeAttention's layer importance (arXiv 2404.04793), over the observation window."""

from __future__ import annotations

import torch

from lt_sglang.identify.scores.base import Score
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.identify.scores.reference import gather, present, projected
from lt_sglang.identify.scores.row_kernels import mean_cosine, output_rows

TINY = torch.finfo(torch.float32).tiny


class Squeeze(Score):
    """Mean over queries of the cosine between the residual stream before and after the attention sublayer.

    A layer whose attention hardly turns the stream is the first to be made lazy. SqueezeAttention averages
    over the whole prompt, clusters the layers in three and shares one budget; here it only ranks them.
    """

    name = "squeeze"
    needs_hidden = True

    def reference(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.hidden is not None
        before = gather(evidence.hidden, evidence.query_rows)
        after = before + projected(evidence, gather(evidence.attention, evidence.query_rows))
        sizes = (before.norm(dim=2) * after.norm(dim=2)).clamp(min=TINY)
        # Absent queries have before = 0, so they add nothing.
        return ((before * after).sum(2) / sizes).sum(1) / present(evidence).sum(1)

    def fused(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.project is not None
        rows, _ = output_rows(evidence, None)
        return mean_cosine(evidence, evidence.reduce(evidence.project(rows)))
