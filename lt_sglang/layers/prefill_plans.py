"""How the plan of a prefill gets from SGLang's batch of requests to the attention backend.

The plan needs the requests' prompts, and SGLang's ForwardBatch names only rows. So it goes beside it, in one
PrefillPlans of the model runner:

    put     LightTransferModelRunner.begin_batch, called by hooks/wrappers.forward_batch before SGLang makes
            the ForwardBatch of a batch of requests
    of      init_forward_metadata of the dynamic attention backends, as the forward begins
    clear   LightTransferModelRunner.forward, as it ends, in success or failure

All three run in the same call of TpModelWorker.forward_batch_generation, on one thread.
"""

from __future__ import annotations

from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.layers.prefill import Kind, Prefill


class PrefillPlans:
    """The plan of the prefill that is running, if one is."""

    def __init__(self) -> None:
        self._plans: list[Prefill] | None = None

    def put(self, plans: list[Prefill]) -> None:
        """A prefill is about to run; ``plans``: one a request, in its order."""
        self._plans = plans

    def clear(self) -> None:
        """It has run."""
        self._plans = None

    def of(self, forward_batch: Any) -> list[Prefill]:
        """The plan of the prefill that is running; a warm-up run, which no request is behind, uses set 0.

        Raises:
            LightTransferError: another batch, or none, was planned.
        """
        if self._plans is None and forward_batch.rids:
            raise LightTransferError("prefill: a batch of requests runs that was not planned")
        prefixes = [int(p) for p in forward_batch.extend_prefix_lens_cpu]
        extends = [int(e) for e in forward_batch.extend_seq_lens_cpu]
        shapes = list(zip(prefixes, extends, strict=True))
        if self._plans is None:
            return [Prefill(Kind.KNOWN, 0, 0, prefix, extend) for prefix, extend in shapes]
        if [(plan.prefix, plan.extend) for plan in self._plans] != shapes:
            raise LightTransferError("prefill: the batch that runs is not the one that was planned")
        return self._plans
