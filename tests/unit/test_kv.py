"""lt_sglang.memory.kv: rows of K and of V."""

from __future__ import annotations

import torch

from lt_sglang.memory.kv import KV


def test_rows_of_both() -> None:
    kv = KV(torch.arange(12.0).view(6, 1, 2), -torch.arange(12.0).view(6, 1, 2))
    rows = torch.tensor([4, 0, 4])
    mask = torch.tensor([False, True, False, False, True, False])
    for found, wanted in (
        (kv.at(rows), [4, 0, 4]),
        (kv.where(mask), [1, 4]),
        (kv.where(slice(2, 4)), [2, 3]),
    ):
        assert found.k[:, 0, 0].tolist() == [2.0 * row for row in wanted]
        assert found.v[:, 0, 1].tolist() == [-2.0 * row - 1 for row in wanted]
    kv.at(rows).k.zero_()
    assert kv.k[4, 0, 0] == 8.0, "at copies"
