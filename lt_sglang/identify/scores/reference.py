"""What the scores share, in plain float32 torch: gathering, attention over the selected keys, projection.

D requests, W queries each, S selected keys each; H heads of this rank, padded ones included.
"""

from __future__ import annotations

import torch

from lt_sglang.identify.scores.evidence import Evidence

LOG2E = 1.4426950408889634


def present(evidence: Evidence) -> torch.Tensor:
    """bool [D, W]: which queries there are."""
    return evidence.query_rows >= 0


def gather(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor as float32 [D, n, ...]; absent ones (-1) are zeros."""
    taken = tensor[rows.clamp(min=0).long()].float()
    return taken.masked_fill((rows < 0).view(*rows.shape, *[1] * (taken.dim() - 2)), 0.0)


def scaled_scores(evidence: Evidence) -> torch.Tensor:
    """float32 [D, W, H, S]: scaled scores (base e) of the selected keys; -inf where a query sees none."""
    query = gather(evidence.query, evidence.query_rows)
    keys = gather(evidence.keys, evidence.key_rows)
    grouped = query.unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("dwkgc,dskc->dwkgs", grouped, keys).flatten(2, 3) * evidence.scale
    seen = evidence.key_positions[:, None, :] <= evidence.query_positions[:, :, None]
    seen &= present(evidence)[:, :, None] & (evidence.key_rows >= 0)[:, None, :]
    return scores.masked_fill(~seen[:, :, None, :], float("-inf"))


def masses(evidence: Evidence) -> torch.Tensor:
    """float32 [D, W, real heads]: share of full attention's weight that lies on the selected keys.

    At most 1, whatever the rounding of the log-sum-exp; 0 for absent queries.
    """
    lse = gather(evidence.lse, evidence.query_rows)
    weights = torch.exp2(scaled_scores(evidence) * LOG2E - lse[..., None])
    return weights.sum(3)[:, :, : evidence.heads].clamp(max=1.0)


def streaming_attention(evidence: Evidence) -> torch.Tensor:
    """float32 [D, W, H, dim]: softmax attention over the selected keys alone; zeros if a query sees none."""
    scores = scaled_scores(evidence)
    weights = torch.softmax(scores, 3).masked_fill(scores == float("-inf"), 0.0)
    values = gather(evidence.values, evidence.key_rows)
    grouped = weights.unflatten(2, (values.shape[2], -1))
    return torch.einsum("dwkgs,dskc->dwkgc", grouped, values).flatten(2, 3)


def projected(evidence: Evidence, rows: torch.Tensor) -> torch.Tensor:
    """float32 [D, W, hidden]: W_o applied to rows of concatenated heads, summed over the ranks.

    Args:
        evidence: of D requests.
        rows: float32 [D, W, H, dim], zeros for absent queries; padded heads are taken as zeros.
    """
    assert evidence.project is not None
    real = torch.zeros_like(rows)
    real[:, :, : evidence.heads] = rows[:, :, : evidence.heads]
    out = evidence.project(real.to(evidence.attention.dtype).flatten(2).flatten(0, 1))
    return evidence.reduce(out).float().unflatten(0, rows.shape[:2])
