"""Full attention of a prefill's new tokens over the cached tokens of their requests.

On Hopper, FA3's dense kernel over gathered K and V is the fastest way, the copy included: 8,192 queries over
24,576 tokens, 32 heads, take 4.9 ms and 0.1 ms for gathering; FA3's paged kernel takes 6.0 ms and FA2's,
which stock SGLang runs, 9.3 ms (H200). Without FA3 (sm80, fp8 KV) this is FA2 paged, as in stock.
"""

from __future__ import annotations

from typing import Any

import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
from flashinfer import prefill as flashinfer_prefill
from flashinfer.utils import PosEncodingMode

from lt_sglang.attention.flashinfer_plans import paged, plan_prefill, plan_ragged
from lt_sglang.attention.flashinfer_private import use_kv_indices
from lt_sglang.attention.gathered import fits
from lt_sglang.memory.kv import KV


class PrefixAttention:
    """One plan serves all layers of a prefill; each layer brings its own rows, as many as planned."""

    def __init__(self, workspace: torch.Tensor) -> None:
        self._paged = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="auto")
        self._dense = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="auto")
        self._device = workspace.device
        self._gather = False

    def kernels(self, updater: Any) -> str:
        """FlashInfer's kernels for prefills of these heads and dtypes: fa2 or fa3."""
        backend: str = flashinfer_prefill.determine_attention_backend(
            self._device,
            PosEncodingMode.NONE.value,
            False,
            False,
            updater.q_data_type,
            updater.data_type,
            head_dim_qk=updater.head_dim,
            head_dim_vo=updater.head_dim,
        )
        return backend

    @property
    def wrapper(self) -> Any:
        """The wrapper that was planned last."""
        return self._dense if self._gather else self._paged

    def plan(self, updater: Any, extends: list[int], prefixes: list[int]) -> None:
        """Plan for ``extends`` new tokens over ``prefixes`` cached ones, request by request; no waiting.

        updater: SGLang's indices updater, for heads and dtypes. Some prefix must be longer than 0.
        """
        self._gather = self.kernels(updater) == "fa3" and fits(updater, sum(prefixes))
        if self._gather:
            plan_ragged(updater, self._dense, extends, over=prefixes, causal=False)
        else:
            none = torch.empty(1, dtype=torch.int32, device=self._device)  # each layer's come later
            plan_prefill(updater, self._paged, extends, prefixes, none, causal=False)

    def run(
        self, query: torch.Tensor, cache: KV, kv_indices: torch.Tensor, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over the cached tokens only.

        Args:
            query: [new tokens, heads, dim].
            cache: of any rows.
            kv_indices: int32 [sum of prefixes], where the cached tokens are, request after request.
            layer: SGLang's RadixAttention, for its scales.

        Returns:
            [new tokens, heads, dim] and its log-sum-exp to base 2, float32 [new tokens, heads]; 0 and -inf
            where a request has no prefix.
        """
        if self._gather:
            found = self._dense.forward_return_lse(
                query,
                *cache.at(kv_indices),
                causal=False,
                sm_scale=layer.scaling,
                logits_soft_cap=layer.logit_cap,
            )
        else:
            # FA3 keeps where lists begin when it is planned (PrefillSM90Plan), so each layer's rows are a
            # tensor of their own instead of a range of one.
            use_kv_indices(self._paged, kv_indices)
            found = self._paged.forward_return_lse(
                query,
                paged(cache),
                causal=False,
                sm_scale=layer.scaling,
                logits_soft_cap=layer.logit_cap,
                k_scale=layer.k_scale_float,
                v_scale=layer.v_scale_float,
            )
        out, lse = found
        return out, lse
