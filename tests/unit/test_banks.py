"""lt_sglang.memory.banks and flat_pool: banks do not overlap, and SGLang's pools are views of them."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from lt_sglang.errors import LightTransferError
from lt_sglang.memory.banks import MAX_ROWS, BankLayout
from lt_sglang.memory.flat_pool import FlatPool, flat_pool_class

SHAPE = (2, 4)


def random_layout(rng: random.Random) -> BankLayout:
    full, streaming = rng.randint(1, 6), rng.randint(1, 6)
    streaming_rows = rng.randint(2, 40)
    return BankLayout(
        full_banks=full,
        streaming_banks=streaming,
        full_rows=rng.randint(1, 50),
        streaming_rows=streaming_rows,
        staging_rows=rng.randint(0, 30),
        scratch_rows=rng.randint(0, 20),
        sink_base=rng.randint(1, streaming_rows - 1),
    )


def test_banks_cover_the_rows_once() -> None:
    rng = random.Random(1)
    for _ in range(200):
        layout = random_layout(rng)
        ranges = []
        for bank in range(layout.layers):
            rows = layout.full_rows if bank < layout.full_banks else layout.streaming_rows
            ranges.append((layout.bank_start(bank), rows))
        ranges += [
            (layout.staging_bank_start(layer), layout.staging_rows)
            for layer in range(layout.full_banks, layout.layers)
        ]
        ranges.append((layout.scratch_start, layout.scratch_rows))
        end = 0
        for start, rows in ranges:
            assert start == end
            end = start + rows
        assert end == layout.total_rows
        assert layout.layers == layout.full_banks + layout.streaming_banks


def _take_all(pool: FlatPool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    layout = pool.layout
    full = pool.take(layout.full_banks, layout.full_rows, SHAPE, torch.float32, "cpu")
    streaming = pool.take(layout.streaming_banks, layout.streaming_rows, SHAPE, torch.float32, "cpu")
    return full[0] + streaming[0], full[1] + streaming[1]


def test_the_tensors_are_what_and_where_sglang_asked_for() -> None:
    pool = FlatPool(BankLayout(1, 1, 5, 6, 2, 3, sink_base=4))
    for banks, rows in ((1, 5), (1, 6)):
        keys, values = pool.take(banks, rows, SHAPE, torch.float8_e4m3fn, "meta")
        assert {(tensor.device.type, tensor.dtype) for tensor in (*keys, *values)} == {
            ("meta", torch.float8_e4m3fn)
        }
    assert pool.kv.k.shape == pool.kv.v.shape == (5 + 6 + 2 + 3, *SHAPE)
    assert pool.kv.k is not pool.kv.v


def test_the_pools_buffers_are_the_banks() -> None:
    """A row of pool i is row bank_start(i) + row of the flat tensors, for K and for V."""
    rng = random.Random(2)
    for _ in range(50):
        layout = random_layout(rng)
        pool = FlatPool(layout)
        assert not pool.complete
        keys, values = _take_all(pool)
        assert pool.complete
        assert pool.kv.k.shape == pool.kv.v.shape == (layout.total_rows, *SHAPE)
        assert not pool.kv.k.any() and not pool.kv.v.any()
        for bank, (key, value) in enumerate(zip(keys, values, strict=True)):
            row = rng.randrange(len(key))
            key[row], value[row] = bank + 1, -bank - 1
            assert (pool.kv.k[layout.bank_start(bank) + row] == bank + 1).all()
            assert (pool.kv.v[layout.bank_start(bank) + row] == -bank - 1).all()
            assert key.is_contiguous()
        assert len(keys) == layout.layers


def test_pools_built_in_another_order_or_size_are_refused() -> None:
    layout = BankLayout(2, 3, 10, 5, 4, 6, 3)
    with pytest.raises(LightTransferError, match="unexpected order or size"):
        FlatPool(layout).take(3, 5, SHAPE, torch.float32, "cpu")
    with pytest.raises(LightTransferError, match="unexpected order or size"):
        FlatPool(layout).take(2, 11, SHAPE, torch.float32, "cpu")
    pool = FlatPool(layout)
    pool.take(1, 10, SHAPE, torch.float32, "cpu")
    with pytest.raises(LightTransferError, match="unexpected order or size"):
        pool.take(3, 5, SHAPE, torch.float32, "cpu")
    assert not pool.complete
    pool = FlatPool(layout)
    _take_all(pool)
    with pytest.raises(LightTransferError, match="unexpected order or size"):
        pool.take(3, 5, SHAPE, torch.float32, "cpu")


def test_more_rows_than_an_index_can_name_are_refused() -> None:
    fits = BankLayout(1, 1, MAX_ROWS - 20, 10, 4, 6, 3)
    assert fits.total_rows == MAX_ROWS
    FlatPool(fits)
    with pytest.raises(LightTransferError, match=r"KV pools: .* lower --mem-fraction-static"):
        FlatPool(BankLayout(1, 1, MAX_ROWS - 20, 10, 4, 7, 3))


def _pool(layout_name: str = "nhd", v_dim: int = 4) -> type:
    class StockPool:
        def __init__(self, layers: int, rows: int) -> None:
            self.layer_num, self.rows = layers, rows
            self.kv_cache_layout, self.device, self.store_dtype = layout_name, "cpu", torch.float32
            self._create_buffers_normal()

        def _kv_buffer_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
            return (self.rows, 2, 4), (self.rows, 2, v_dim)

        def _create_buffers_normal(self) -> None:
            raise AssertionError("stock buffers were made")

    return StockPool


def test_a_pool_of_sglang_takes_its_buffers_from_the_flat_pool() -> None:
    layout = BankLayout(2, 3, 10, 5, 4, 6, 3)
    pool = FlatPool(layout)
    made = flat_pool_class(_pool(), pool)
    assert made.__name__ == made.__qualname__ == "FlatStockPool"
    full, streaming = made(2, 10), made(3, 5)
    assert pool.complete
    buffers: list[SimpleNamespace] = [full, streaming]
    assert [len(pool.k_buffer) for pool in buffers] == [2, 3]
    assert streaming.v_buffer[1].data_ptr() == pool.kv.v[layout.bank_start(3)].data_ptr()


@pytest.mark.parametrize("odd", [{"layout_name": "hnd"}, {"v_dim": 8}])
def test_other_layouts_are_refused(odd: dict[str, object]) -> None:
    pool = flat_pool_class(_pool(**odd), FlatPool(BankLayout(2, 3, 10, 5, 4, 6, 3)))
    with pytest.raises(LightTransferError, match="NHD layout"):
        pool(2, 10)
