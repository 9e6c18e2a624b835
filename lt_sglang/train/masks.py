"""Which token attends to which in training: one mask function, as a BlockMask or as a dense mask.

Dimensions: B rows of a batch, T tokens of a row. A row may hold several documents (packed samples) and
padding. A token sees a token of its own document only, never a later one; in a lazy layer only the first
``sink_tokens`` of its document and the last ``recent_tokens`` up to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from lt_sglang.errors import LightTransferError

MaskMod = Callable[[Any, Any, Any, Any], Any]

BLOCK = 128  # FlexAttention's: queries and keys of one tile
ROWS_AT_ONCE = 1024  # queries whose mask is looked at together; bounds the memory of making a BlockMask


@dataclass(frozen=True)
class Tokens:
    """Where each token of a batch stands.

    document: [B, T] int32, which document of its row a token belongs to; every padding token is a document of
        its own. position: [B, T] int32, from 0 in its document. single: each row is one document without
        padding, so that nothing needs to be compared.
    """

    document: torch.Tensor
    position: torch.Tensor
    single: bool


def tokens_of(
    batch: int,
    length: int,
    device: torch.device,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> Tokens:
    """Documents and positions, from what a trainer passes to a model.

    Args:
        batch: B.
        length: T.
        device: of the result.
        position_ids: [1 or B, T]; a document begins where they do not go on by one (padding-free batches).
        attention_mask: [B, T], 1 for tokens and 0 for padding, on either side.

    Raises:
        LightTransferError: for a mask of another shape.
    """
    index = torch.arange(length, dtype=torch.int32, device=device).expand(batch, length)
    starts = torch.zeros((batch, length), dtype=torch.bool, device=device)
    starts[:, 0] = True
    if position_ids is not None:
        given = position_ids.to(device).expand(batch, length)
        starts[:, 1:] = given[:, 1:] - given[:, :-1] != 1
    if attention_mask is not None:
        if attention_mask.shape != (batch, length):
            raise LightTransferError(
                f"attention_mask: has the shape {tuple(attention_mask.shape)}, not {(batch, length)}"
            )
        padding = attention_mask.to(device) == 0
        starts |= padding
        starts[:, 1:] |= padding[:, :-1]
    document = starts.cumsum(1, dtype=torch.int32)
    first = torch.where(starts, index, 0).cummax(1).values
    return Tokens(document, (index - first).to(torch.int32), bool((document[:, -1] == 1).all()))


def full_mask(tokens: Tokens) -> MaskMod:
    """The mask of a full layer: a query attends to all earlier tokens of its document, and to itself."""
    if tokens.single:
        return _causal
    document = tokens.document

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (document[b, q] == document[b, k])

    return mask


def lazy_mask(tokens: Tokens, sink_tokens: int, recent_tokens: int) -> MaskMod:
    """The mask of a lazy layer: of those only the first ``sink_tokens`` and the last ``recent_tokens``."""
    document, position = tokens.document, tokens.position

    def alone(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & ((k < sink_tokens) | (q - k < recent_tokens))

    def packed(b: Any, h: Any, q: Any, k: Any) -> Any:
        near = (position[b, k] < sink_tokens) | (q - k < recent_tokens)
        return (q >= k) & (document[b, q] == document[b, k]) & near

    return alone if tokens.single else packed


def _causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def dense(mask: MaskMod, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """[B, 1, T, T] bool, True where a query (third) sees a key (fourth)."""
    rows = torch.arange(length, device=device)
    return _rows(mask, batch, rows, length)[:, None]


def block_mask(mask: MaskMod, batch: int, length: int, device: torch.device) -> BlockMask:
    """The same for FlexAttention: which tiles of 128 x 128 hold anything, and which are seen whole.

    Equal to torch's ``create_block_mask``, whose memory without torch.compile grows with S x S; here a strip
    of queries is looked at at a time.
    """
    blocks = -(-length // BLOCK)
    some = torch.empty((batch, blocks, blocks), dtype=torch.bool, device=device)
    whole = torch.empty_like(some)
    for start in range(0, blocks * BLOCK, ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, length), device=device)
        seen = _rows(mask, batch, rows, length)
        missing = (-len(rows) % BLOCK, -length % BLOCK)
        seen = torch.nn.functional.pad(seen, (0, missing[1], 0, missing[0]))
        tiles = seen.view(batch, seen.shape[1] // BLOCK, BLOCK, blocks, BLOCK)
        place = slice(start // BLOCK, start // BLOCK + tiles.shape[1])
        some[:, place] = tiles.any(4).any(2)
        whole[:, place] = tiles.all(4).all(2)
    part = some & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=(length, length)
    )


def visited_blocks(mask: BlockMask) -> int:
    """Tiles that FlexAttention computes, over all rows of the batch."""
    whole = mask.full_kv_num_blocks
    return int(mask.kv_num_blocks.sum()) + (int(whole.sum()) if whole is not None else 0)


def _rows(mask: MaskMod, batch: int, rows: torch.Tensor, length: int) -> torch.Tensor:
    """[B, rows, T] bool."""
    b = torch.arange(batch, device=rows.device)[:, None, None]
    k = torch.arange(length, device=rows.device)[None, None, :]
    seen: torch.Tensor = mask(b, 0, rows[None, :, None], k)
    return seen.expand(batch, len(rows), length)


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many keys' tiles each queries' tile has, and which: [B, 1, blocks(, blocks)] int32."""
    order = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()
