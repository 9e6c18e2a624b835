"""FA3's dense kernel over gathered K and V: causal attention of a prefill's new tokens, whole or windowed.

FA3's paged kernel is slower than its dense one by more than a copy of K and V takes, and FA2 slower still
(attention/prefix.py has figures). One call over cached and new tokens also needs no merging of two results.
"""

from __future__ import annotations

from typing import Any

import torch
from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

from lt_sglang.attention.flashinfer_plans import plan_ragged
from lt_sglang.memory.kv import KV

# K and V of one layer of a batch; more is read where it is. A copy takes memory beside the KV pools, which
# SGLang did not reckon with; GPUs that run FA3 have 80 GB or more. 131,072 tokens of 8 KV heads of 128.
GATHER_BYTES = 1 << 29
_ELEMENT_BYTES = 2  # FA3 reads float16 and bfloat16


def fits(updater: Any, tokens: int) -> bool:
    """Whether a batch's ``tokens`` are few enough to be copied, layer by layer.

    updater: SGLang's indices updater, for the heads of this rank.
    """
    row_bytes = 2 * int(updater.num_kv_heads) * int(updater.head_dim) * _ELEMENT_BYTES
    return tokens * row_bytes <= GATHER_BYTES


class GatheredAttention:
    """One plan serves all layers of a prefill that attend alike.

    Args:
        workspace: FlashInfer's.
        window_left: tokens before itself that a query sees; -1 for all.
    """

    def __init__(self, workspace: torch.Tensor, window_left: int = -1) -> None:
        self.wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
        self._window_left = window_left
        self._only_new = False

    def plan(self, updater: Any, extends: list[int], spans: list[int]) -> None:
        """Plan for ``extends`` new tokens as the last of ``spans`` tokens, request by request; no waiting.

        updater: SGLang's indices updater, for heads and dtypes.
        """
        self._only_new = spans == extends
        windowed = self._window_left >= 0  # then all tiles of queries are the same work
        plan_ragged(
            updater,
            self.wrapper,
            extends,
            over=spans,
            causal=not windowed,
            window_left=self._window_left,
        )

    def run(
        self,
        query: torch.Tensor,
        new: KV | None,
        cache: KV,
        kv_indices: torch.Tensor,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend causally.

        Args:
            query: [new tokens, heads, dim], dims next to each other.
            new: of the new tokens as projected; read if they are all.
            cache: of any rows; of the new tokens too.
            kv_indices: int [sum of spans], where the tokens are, request after request.
            layer: SGLang's RadixAttention, for its scales.

        Returns:
            [new tokens, heads, dim] and its log-sum-exp to base 2, float32 [new tokens, heads].
        """
        read = new if new is not None and self._only_new else cache.at(kv_indices)
        found: tuple[torch.Tensor, torch.Tensor] = self.wrapper.forward_return_lse(
            query,
            *read,
            causal=True,
            window_left=self._window_left,
            sm_scale=layer.scaling,
            logits_soft_cap=layer.logit_cap,
        )
        return found
