"""The interface of a score."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from lt_sglang.identify.scores.evidence import Evidence


class Score(ABC):
    """Says how little of its attention a layer loses when it is made lazy.

    name: what a configuration calls it.
    needs_hidden: the evidence must carry ``hidden`` and ``project``.
    """

    name: str
    needs_hidden: bool = False

    def laziness(self, evidence: Evidence) -> torch.Tensor:
        """float32 [D]; the higher, the sooner the layer is made lazy.

        Never waits for the device, runs the same reductions on every rank, and gives every rank the same
        values. Comparable between the layers of one request, not between requests or scores.
        """
        return self.fused(evidence) if evidence.query.is_cuda else self.reference(evidence)

    @abstractmethod
    def reference(self, evidence: Evidence) -> torch.Tensor:
        """The definition, in plain float32 torch; also what a CPU runs."""

    @abstractmethod
    def fused(self, evidence: Evidence) -> torch.Tensor:
        """The same by Triton kernels; also runs under Triton's interpreter."""
