"""Which rows of the streaming buffers the lazy layers read.

A request whose sequence is ``n`` tokens long (its current query included) reads, in a lazy layer, the
sinks that left the window, then the window, ``min(n, w_sink + w_recent)`` rows in all:

    first = max(n - w_recent, 0)               first position of the window
    sinks = min(w_sink, first)                 positions 0 .. sinks - 1, from its sink set if it has
                                               one, else still from its ordinary slots
    window                                     positions first .. n - 1, from ordinary slots

RoPE was applied when the keys were written, so the order of rows carries no meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class StreamingTables(NamedTuple):
    """Where positions live on the device.

    req_to_token: int32 [request rows, context], full-pool slot of each position.
    full_to_streaming: int64 [full slots + 2], streaming slot of each full-pool slot (0: none).
    sink_set_of: int32 [request rows], sink set of each request row, or -1.
    """

    req_to_token: torch.Tensor
    full_to_streaming: torch.Tensor
    sink_set_of: torch.Tensor


@dataclass(frozen=True)
class Windows:
    """w_sink, w_recent, and the first row of sink set 0 in the streaming buffers."""

    sink_tokens: int
    recent_tokens: int
    sink_base: int

    @property
    def lazy_tokens(self) -> int:
        """Rows a request reads at most."""
        return self.sink_tokens + self.recent_tokens


def lazy_lengths(seq_lens: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Rows each request reads in a lazy layer; same shape, dtype and device as ``seq_lens``."""
    return seq_lens.clamp(max=windows.lazy_tokens)


def sink_rows(rows: torch.Tensor, tables: StreamingTables, windows: Windows) -> torch.Tensor:
    """Where the sinks of requests are now.

    Args:
        rows: int64 [bs], request rows.
        tables: where positions live.
        windows: w_sink and w_recent.

    Returns:
        int64 [bs, w_sink]. Entries of positions not yet computed are meaningless (and in bounds).
    """
    count = windows.sink_tokens
    sets = tables.sink_set_of[rows].to(torch.int64)[:, None]
    column = torch.arange(count, device=rows.device)
    stored = windows.sink_base + sets * count + column
    slots = tables.full_to_streaming[tables.req_to_token[rows, :count].to(torch.int64)]
    return torch.where(sets >= 0, stored, slots)


def span_slots(
    rows: torch.Tensor, first: torch.Tensor, counts: torch.Tensor, total: int, tables: StreamingTables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of positions first[b] .. first[b] + counts[b] - 1 of each request, packed.

    Args:
        rows: int64 [bs] on the device, request rows.
        first: int64 [bs] on the device.
        counts: int64 [bs] on the device.
        total: sum of counts, known on the host, so that nothing waits for the device.
        tables: where positions live.

    Returns:
        Full and streaming slots, int32 [total] each; copies.
    """
    request = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts, output_size=total)
    start = torch.cumsum(counts, 0) - counts
    position = torch.arange(total, device=rows.device) - start[request] + first[request]
    full = tables.req_to_token[rows[request], position]
    return full, tables.full_to_streaming[full.to(torch.int64)].to(torch.int32)


def decode_kv_indices_reference(
    rows: torch.Tensor, seq_lens: torch.Tensor, tables: StreamingTables, windows: Windows
) -> torch.Tensor:
    """Rows each request's newest query reads, packed request after request; int32 [sum of lengths].

    The plain torch form: the reference of the Triton kernel, and what the CPU backend runs.
    """
    sinks = sink_rows(rows, tables, windows)
    packed = []
    for index, row in enumerate(rows.tolist()):
        length = int(seq_lens[index])
        first = max(length - windows.recent_tokens, 0)
        window = tables.full_to_streaming[tables.req_to_token[row, first:length].to(torch.int64)]
        packed += [sinks[index, : min(windows.sink_tokens, first)], window]
    return torch.cat(packed).to(torch.int32)
