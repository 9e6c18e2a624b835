"""How FlashInfer's wrappers are planned here; both modes use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lt_sglang.attention.flashinfer_private import use_kv_indices, use_kv_indptr
from lt_sglang.memory.kv import KV


@dataclass(frozen=True)
class LayerIndices:
    """Rows that every layer of every request reads, in one buffer.

    kv_indices: int32. kv_indptr: int32 [L * requests + 1], where each layer's list of each request begins.
    """

    kv_indices: torch.Tensor
    kv_indptr: torch.Tensor
    requests: int

    def use(self, wrapper: Any, layer: int) -> None:
        """Let the next run of a planned FA2 ``wrapper`` read the lists of ``layer``.

        They may be empty where they were planned, and in tensor-core decode shorter.
        """
        first = layer * self.requests
        use_kv_indptr(wrapper, self.kv_indptr[first : first + self.requests + 1])
        use_kv_indices(wrapper, self.kv_indices)


@contextmanager
def copied(wrapper: Any) -> Iterator[None]:
    """Around a plan: wait until the device has taken the wrapper's last one.

    FlashInfer writes plans into pinned memory that belongs to the wrapper, and the device copies them from
    there when it gets to it. Stock SGLang plans prefills from device tensors, which waits for everything
    before; here nothing else does. The scheduler is one batch ahead at most, so the copy is nearly always
    done, but it need not be where processes take turns on a GPU. Decode with the next step's plan, where
    another request has a row, never ends: a chunk that begins after its list's end has 2^32 tokens, an
    unsigned difference (decode.cuh, BatchDecodeWithPagedKVCacheDevice).
    """
    event = getattr(wrapper, "_lt_plan_copied", None)
    if event is not None:
        event.synchronize()
    yield
    if torch.cuda.is_available():
        wrapper._lt_plan_copied = event = event or torch.cuda.Event()
        event.record()


def by_head(query: torch.Tensor, layer: Any) -> torch.Tensor:
    """[tokens, heads * dim] as [tokens, heads, dim], where it lies.

    The query is a part of the projection's output, with K and V behind it in every row. FlashInfer's prefill
    kernels take strides; SGLang copies it, 90 us a layer for 8,192 tokens of 32 heads (H200).
    """
    if query.stride(-1) != 1:
        query = query.contiguous()
    return query.view(-1, layer.tp_q_head_num, layer.head_dim)


def paged(cache: KV) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as FlashInfer's paged wrappers take them, in pages of one row: [rows, 1, KV heads, dim]."""
    return cache.k.unsqueeze(1), cache.v.unsqueeze(1)


def host_indptr(lengths: torch.Tensor | list[int]) -> torch.Tensor:
    """int32 [n + 1] on the host: 0 and the running sums of ``lengths``."""
    indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.as_tensor(lengths, dtype=torch.int32), 0, out=indptr[1:])
    return indptr


def plan_decode(
    updater: Any,
    wrapper: Any,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    last_page_len: torch.Tensor,
    kv_indptr_host: torch.Tensor,
    fixed_split_size: int | None,
    disable_split_kv: bool | None,
) -> None:
    """Plan a decode wrapper.

    Args:
        updater: SGLang's indices updater, for heads and dtypes.
        wrapper: FlashInfer's.
        kv_indptr: int32 [bs + 1], on the device or the host.
        last_page_len: int32 [bs], likewise.
        kv_indices: int32, of the wrapper's device.
        kv_indptr_host: as ``kv_indptr``, on the host.
        fixed_split_size: as SGLang gives it.
        disable_split_kv: as SGLang gives it.
    """
    fast = {"global_override_indptr_cpu": kv_indptr_host} if is_replanned(wrapper) else {}
    with copied(wrapper):
        wrapper.begin_forward(
            kv_indptr,
            kv_indices,
            last_page_len,
            *_shape(updater),
            1,
            data_type=updater.data_type,
            q_data_type=updater.q_data_type,
            non_blocking=True,
            fixed_split_size=fixed_split_size,
            disable_split_kv=bool(disable_split_kv),
            **fast,
        )


def is_replanned(wrapper: Any) -> bool:
    """Whether SGLang has swapped begin_forward for fast_decode_plan: after a graph's first plan."""
    return hasattr(wrapper.begin_forward, "func")


def plan_ragged(
    updater: Any,
    wrapper: Any,
    extends: list[int],
    over: list[int] | None = None,
    *,
    causal: bool = True,
    window_left: int = -1,
) -> None:
    """Plan a ragged wrapper for ``extends`` new tokens, request by request.

    over: tokens they attend to, themselves if not given. causal: whether later queries are more work; the
    mask is the run's business.
    """
    with copied(wrapper):
        wrapper.begin_forward(
            host_indptr(extends),
            host_indptr(extends if over is None else over),
            *_shape(updater),
            causal=causal,
            window_left=window_left,
            q_data_type=updater.q_data_type,
        )


def plan_prefill(
    updater: Any,
    wrapper: Any,
    extends: list[int],
    spans: list[int],
    kv_indices: torch.Tensor,
    *,
    causal: bool,
    window_left: int = -1,
) -> None:
    """Plan a paged prefill wrapper: ``extends`` queries over ``spans`` keys, request by request."""
    # Host tensors: FlashInfer plans on the host, and device ones would cost it three waits. The length of the
    # last page tells an empty list from one of a single row (get_seq_lens).
    with copied(wrapper):
        wrapper.begin_forward(
            host_indptr(extends),
            host_indptr(spans),
            kv_indices,
            torch.tensor([min(span, 1) for span in spans], dtype=torch.int32),
            *_shape(updater),
            1,
            causal=causal,
            window_left=window_left,
            q_data_type=updater.q_data_type,
            kv_data_type=updater.data_type,
            non_blocking=True,
        )


def _shape(updater: Any) -> tuple[int, int, int]:
    return updater.num_qo_heads, updater.num_kv_heads, updater.head_dim
