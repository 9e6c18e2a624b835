"""Which streaming slots the lazy layers read.

A request whose sequence is ``n`` tokens long (its current query included) reads, in a lazy layer, the
sinks that left the window, then the window, ``min(n, w_sink + w_recent)`` slots in all:

    first = max(n - w_recent, 0)               first position of the window
    sinks = min(w_sink, first)                 positions 0 .. sinks - 1, from its sink set if it has
                                               one, else still from its ordinary slots
    window                                     positions first .. n - 1, from ordinary slots

RoPE was applied when the keys were written, so the order of slots carries no meaning. A slot is a row of the
layers in the first of its units; of other layers its row is in ``UnitList.rest`` (memory/units.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class StreamingTables(NamedTuple):
    """Where positions live on the device.

    req_to_token: int32 [request rows, context], full slot of each position.
    full_to_streaming: int64 [full slots + 2], streaming slot of each full slot (0: none).
    sink_set_of: int32 [request rows], sink set of each request row, or -1.
    sink_slots_of: int32 [sets, w_sink], streaming slots of a sink set.
    """

    req_to_token: torch.Tensor
    full_to_streaming: torch.Tensor
    sink_set_of: torch.Tensor
    sink_slots_of: torch.Tensor


@dataclass(frozen=True)
class Windows:
    """w_sink and w_recent."""

    sink_tokens: int
    recent_tokens: int

    @property
    def lazy_tokens(self) -> int:
        """Slots a request reads at most."""
        return self.sink_tokens + self.recent_tokens


def lazy_lengths(seq_lens: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Slots each request reads in a lazy layer; same shape, dtype and device as ``seq_lens``."""
    return seq_lens.clamp(max=windows.lazy_tokens)


def sink_slots(rows: torch.Tensor, tables: StreamingTables, windows: Windows) -> torch.Tensor:
    """Streaming slots of the sinks of requests now.

    Args:
        rows: int64 [bs], request rows.
        tables: where positions live.
        windows: w_sink and w_recent.

    Returns:
        int64 [bs, w_sink]. Entries of positions not yet computed are meaningless (and in bounds).
    """
    sets = tables.sink_set_of[rows].to(torch.int64)
    stored = tables.sink_slots_of[sets.clamp(min=0)].to(torch.int64)
    slots = tables.full_to_streaming[tables.req_to_token[rows, : windows.sink_tokens].to(torch.int64)]
    return torch.where(sets[:, None] >= 0, stored, slots)


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
    """Streaming slots that each request's newest query reads, request after request; int32 [sum of lengths].

    The plain torch form: the reference of the Triton kernel, and what the CPU backend runs.
    """
    sinks = sink_slots(rows, tables, windows)
    packed = []
    for index, row in enumerate(rows.tolist()):
        length = int(seq_lens[index])
        first = max(length - windows.recent_tokens, 0)
        window = tables.full_to_streaming[tables.req_to_token[row, first:length].to(torch.int64)]
        packed += [sinks[index, : min(windows.sink_tokens, first)], window]
    return torch.cat(packed).to(torch.int32)
