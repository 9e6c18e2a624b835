"""The CPU backend: the same semantics in plain torch. The reference of the GPU path.

Full layers run SGLang's own torch_native code, untouched, where their slots are rows (attention/parts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

from lt_sglang.attention.indices import (
    StreamingTables,
    Windows,
    decode_kv_indices_reference,
    lazy_lengths,
    sink_slots,
)
from lt_sglang.attention.parts import LayerParts
from lt_sglang.memory.kv import KV

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from lt_sglang.attention.runner import HybridRunner

QUERY_BLOCK = 512
EVERYTHING = Windows(0, 1 << 30)  # streaming attention that is full attention


class LightTransferTorchBackend(TorchNativeAttnBackend):
    """TorchNativeAttnBackend whose lazy layers read sink + recent rows of the streaming pool."""

    def __init__(self, model_runner: HybridRunner) -> None:
        super().__init__(model_runner)
        self.lazy_layers = frozenset(model_runner.lt_config.lazy_layers)
        self._runner = model_runner
        self._parts: LayerParts | None = None
        if self.lazy_layers:
            self._parts = LayerParts(model_runner.flat_pool, model_runner.lt_config.lazy_layers)
        self._decode_slots: list[torch.Tensor] = []
        self._sink_slots: torch.Tensor | None = None
        # Nothing here is specific to a CPU, so this backend is also the eager reference on a GPU.
        self.kv_index_translator = model_runner.kv_index_translator

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Compute, once a forward, the slots every lazy layer of it reads."""
        super().init_forward_metadata(forward_batch)
        if not self.lazy_layers or forward_batch.forward_mode.is_idle():
            return
        tables, windows = self._runner.streaming_tables(), self._runner.windows()
        rows = forward_batch.req_pool_indices
        if forward_batch.forward_mode.is_decode():
            self._decode_slots = decode_slot_lists(rows, forward_batch.seq_lens, tables, windows)
        else:
            self._sink_slots = sink_slots(rows, tables, windows)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[tokens, heads * dim] of the batch's new tokens."""
        lazy = layer.layer_id in self.lazy_layers
        if not lazy and self._as_stock(layer):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        load = self._write(k, v, layer, forward_batch, save_kv_cache)
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(query)
        tables, windows = self._runner.streaming_tables(), self._runner.windows() if lazy else EVERYTHING
        assert self._sink_slots is not None
        start = 0
        for index, row in enumerate(forward_batch.req_pool_indices.tolist()):
            prefix = int(forward_batch.extend_prefix_lens[index])
            length = int(forward_batch.extend_seq_lens[index])
            slots = tables.req_to_token[row, : prefix + length].to(torch.int64)
            if lazy:
                slots = tables.full_to_streaming[slots]
            new = slice(start, start + length)
            sinks = self._sink_slots[index]
            out[new] = attend_streaming(query[new], prefix, slots, sinks, windows, load, layer)
            start += length
        return out.view(q.shape[0], -1)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[requests, heads * dim]."""
        lazy = layer.layer_id in self.lazy_layers
        if not lazy and self._as_stock(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        load = self._write(k, v, layer, forward_batch, save_kv_cache)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(query)
        read = self._decode_slots
        if not lazy:
            lengths = forward_batch.seq_lens.tolist()
            table = self._runner.streaming_tables().req_to_token[forward_batch.req_pool_indices]
            read = [row[:length].to(torch.int64) for row, length in zip(table, lengths, strict=True)]
        for index, selected in enumerate(read):
            one = slice(index, index + 1)
            out[one] = attend(query[one], load(selected), None, layer)
        return out.view(query.shape[0], -1)

    def _as_stock(self, layer: RadixAttention) -> bool:
        """Whether the slots of a full layer are its rows."""
        return self._parts is None or self._parts.of(layer.layer_id) == 0

    def _write(
        self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch, save: bool
    ) -> Callable[[torch.Tensor], KV]:
        """Write new K and V; what reads those of slots (int64 [n])."""
        if save and k is not None:
            where = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
        cache = KV(*self.token_to_kv_pool.get_kv_buffer(layer.layer_id))
        assert self._parts is not None
        part, parts = self._parts.of(layer.layer_id), self._parts
        return lambda slots: cache.at(parts.rows(slots, part + 1)[part])


def decode_slot_lists(
    requests: torch.Tensor, seq_lens: torch.Tensor, tables: StreamingTables, windows: Windows
) -> list[torch.Tensor]:
    """The streaming slots a lazy layer reads in a decode step, one int64 tensor a request."""
    packed = decode_kv_indices_reference(requests, seq_lens, tables, windows)
    return list(packed.to(torch.int64).split(lazy_lengths(seq_lens, windows).tolist()))


def attend_streaming(
    query: torch.Tensor,
    position: int,
    slots: torch.Tensor,
    sinks: torch.Tensor,
    windows: Windows,
    load: Callable[[torch.Tensor], KV],
    layer: RadixAttention,
) -> torch.Tensor:
    """Streaming attention of a request's queries from ``position`` on; [queries, heads, dim].

    slots, sinks: as for ``block_keys``. load: those of int64 [n] rows.
    """
    out = torch.empty_like(query)
    for offset in range(0, len(query), QUERY_BLOCK):
        count = min(QUERY_BLOCK, len(query) - offset)
        block = slice(offset, offset + count)
        rows, mask = block_keys(slots, position + offset, count, sinks, windows)
        out[block] = attend(query[block], load(rows), mask, layer)
    return out


def block_keys(
    slots: torch.Tensor, position: int, count: int, sinks: torch.Tensor, windows: Windows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that ``count`` queries from ``position`` on read, and the mask [count, rows] of who sees what.

    slots: int64, streaming slot of each position of the request. sinks: int64 [w_sink], rows of its sinks.
    """
    first = max(position - windows.recent_tokens + 1, 0)
    outside = min(windows.sink_tokens, max(position + count - windows.recent_tokens, 0))
    selected = torch.cat([sinks[:outside], slots[first : position + count]])
    device = selected.device
    query = torch.arange(position, position + count, device=device)[:, None]
    key = torch.arange(first, position + count, device=device)[None, :]
    window_mask = (key <= query) & (query - key < windows.recent_tokens)
    sink = torch.arange(outside, device=device)[None, :]
    return selected, torch.cat([query - sink >= windows.recent_tokens, window_mask], 1)


def attend(query: torch.Tensor, read: KV, mask: torch.Tensor | None, layer: RadixAttention) -> torch.Tensor:
    """Softmax attention of [queries, heads, dim] over [keys, kv heads, dim]; bool mask [queries, keys]."""
    return (
        scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            read.k.to(query.dtype).transpose(0, 1).unsqueeze(0),
            read.v.to(query.dtype).transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            scale=layer.scaling,
        )
        .squeeze(0)
        .transpose(0, 1)
    )
