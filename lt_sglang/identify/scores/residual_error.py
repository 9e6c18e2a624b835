"""The error that streaming attention would put into the residual stream."""

from __future__ import annotations

import torch

from lt_sglang.identify.scores.attend_kernel import attend
from lt_sglang.identify.scores.base import Score
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.identify.scores.reference import gather, present, projected, streaming_attention
from lt_sglang.identify.scores.row_kernels import negative_ratio, output_rows

TINY = torch.finfo(torch.float32).tiny


class ResidualError(Score):
    """Minus the maximum over queries of ||W_o (o_full - o_stream)|| / ||x||.

    o_stream is softmax attention renormalised over the selected keys, x the residual stream at the layer's
    input. Unlike an attention weight, it counts what the discarded values do to the layer's output.
    """

    name = "residual-error"
    needs_hidden = True

    def reference(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.hidden is not None
        full = gather(evidence.attention, evidence.query_rows)
        error = projected(evidence, full - streaming_attention(evidence)).norm(dim=2)
        size = gather(evidence.hidden, evidence.query_rows).norm(dim=2)
        ratio = (error / size.clamp(min=TINY)).masked_fill(~present(evidence), 0.0)
        return -ratio.amax(1)

    def fused(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.project is not None
        rows, laziness = output_rows(evidence, attend(evidence, with_values=True))
        negative_ratio(evidence, evidence.reduce(evidence.project(rows)), laziness)
        return laziness
