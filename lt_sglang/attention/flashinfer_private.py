"""Every use of FlashInfer's private names; upstream/attributes.py records them.

Wrappers are planned once for all layers, and each layer then exchanges what the run reads: the lists, the
plan, or the workspace that the plan lies in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from lt_sglang.errors import LightTransferError


class PrefillPlanInfo(NamedTuple):
    """FlashInfer's plan of FA2 prefill and of tensor-core decode (a prefill of one query a request).

    Offsets are bytes in the integer workspace, but for v_offset and s_offset, in the float workspace.
    Source: flashinfer/data/include/flashinfer/attention/scheduler.cuh, as is the next.
    """

    padded_batch_size: int
    total_num_rows: int
    total_num_rows_offset: int
    cta_tile_q: int
    request_indices_offset: int
    qo_tile_indices_offset: int
    kv_tile_indices_offset: int
    merge_indptr_offset: int
    o_indptr_offset: int
    kv_chunk_size_ptr_offset: int
    v_offset: int
    s_offset: int
    block_valid_mask_offset: int
    enable_cuda_graph: int
    split_kv: int


class PrefillPlanSM90Info(NamedTuple):
    """FlashInfer's plan of FA3 prefill, an entry for each tile of queries and head. Offsets are bytes."""

    qo_tile_indices_offset: int
    qo_indptr_offset: int
    kv_indptr_offset: int
    qo_len_offset: int
    kv_len_offset: int
    head_indices_offset: int
    work_indptr_offset: int
    batch_indices_offset: int
    same_schedule_for_all_heads: int


def plan_info(wrapper: Any) -> PrefillPlanInfo:
    """The plan of an FA2 prefill or tensor-core decode wrapper; raises LightTransferError for another's."""
    return PrefillPlanInfo(*_fields(wrapper, PrefillPlanInfo))


def sm90_plan_info(wrapper: Any) -> PrefillPlanSM90Info:
    """The plan of an FA3 prefill wrapper; raises LightTransferError for another's."""
    return PrefillPlanSM90Info(*_fields(wrapper, PrefillPlanSM90Info))


def _fields(wrapper: Any, form: Any) -> list[int]:
    fields = [int(value) for value in wrapper._plan_info]
    if len(fields) != len(form._fields):
        raise LightTransferError(
            f"FlashInfer's plan {fields} is no {form.__name__}; use flashinfer-python 0.7.2"
        )
    return fields


def int_workspace(wrapper: Any) -> torch.Tensor:
    """uint8, where the wrapper's plan lies."""
    workspace: torch.Tensor = wrapper._int_workspace_buffer
    return workspace


def kv_indices_buffer(wrapper: Any) -> torch.Tensor:
    """int32, the list that a wrapper under CUDA graphs reads."""
    buffer: torch.Tensor = wrapper._paged_kv_indices_buf
    return buffer


def use_kv_indices(wrapper: Any, kv_indices: torch.Tensor) -> None:
    """Let the next run of a paged wrapper read ``kv_indices`` (int32)."""
    wrapper._paged_kv_indices_buf = kv_indices


def use_kv_indptr(wrapper: Any, kv_indptr: torch.Tensor) -> None:
    """Let the next run, or plan, of a paged wrapper use ``kv_indptr`` (int32 [requests + 1])."""
    wrapper._paged_kv_indptr_buf = kv_indptr


@contextmanager
def planned(wrapper: Any, info: PrefillPlanInfo, workspace: torch.Tensor) -> Iterator[None]:
    """Let a decode wrapper run the plan ``info``, written into ``workspace`` (uint8), instead of its own."""
    own = wrapper._int_workspace_buffer, wrapper._plan_info
    wrapper._int_workspace_buffer, wrapper._plan_info = workspace, list(info)
    try:
        yield
    finally:
        wrapper._int_workspace_buffer, wrapper._plan_info = own
