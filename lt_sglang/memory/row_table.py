"""Tables on the device with one element for each row of req_to_token."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def set_rows(table: torch.Tensor, values: Mapping[int, int]) -> None:
    """table[row] = value for every item of ``values``, on the current stream; table: int32."""
    if not values:
        return
    rows = torch.tensor(list(values), dtype=torch.int64).to(table.device, non_blocking=True)
    new = torch.tensor(list(values.values()), dtype=torch.int32).to(table.device, non_blocking=True)
    table.index_copy_(0, rows, new)
