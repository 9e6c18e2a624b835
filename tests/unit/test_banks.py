"""lt_sglang.memory.banks and flat_pool: where rows of a layer are, and SGLang's pools as views of them."""

from __future__ import annotations

import random
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lt_sglang.errors import LightTransferError
from lt_sglang.memory.banks import MAX_ROWS, BankLayout
from lt_sglang.memory.flat_pool import FlatPool, flat_pool_class
from lt_sglang.memory.units import UnitList, UnitShape

SHAPE = (2, 4)
TWO_AND_FOUR = UnitShape(2, 4)  # two lanes; a token has one unit in full layers, two in lazy ones


def make(shape: UnitShape = TWO_AND_FOUR, units: int = 9, page: int = 1) -> FlatPool:
    free = UnitList(units, page, shape.parts, "cpu")
    return FlatPool(BankLayout(shape, free.rows), free)


def random_pool(rng: random.Random) -> FlatPool:
    shape = UnitShape(rng.randint(0, 6), rng.randint(1, 6))
    return make(shape, rng.randint(20, 40), rng.choice([1, 4]))


def test_a_slots_rows_in_all_banks_of_its_kind_are_its_units() -> None:
    """All of them and no other: two slots share no row, and no row of the tensors is out of reach."""
    rng = random.Random(1)
    for _ in range(60):
        pool = random_pool(rng)
        layout, units, page = pool.layout, pool.units, pool.units.page_size
        shape = layout.shape
        assert (layout.full_banks, layout.streaming_banks) == (shape.full_layers, shape.lazy_layers)
        assert layout.layers == shape.layers and layout.total_rows == shape.lanes * units.rows
        kinds = [(range(layout.full_banks), shape.full_units)]
        kinds.append((range(layout.full_banks, layout.layers), shape.streaming_units))
        seen: list[int] = []
        for banks, parts in kinds:
            if parts:
                first = units.take(rng.randint(1, len(units) // parts // 2 or 1), parts)
                slots = (first[:, None] * page + torch.arange(page)).flatten()
                for bank in banks:
                    seen += layout.bank_rows(bank, slots, units.rest).tolist()
        taken = units.size - len(units)
        assert len(seen) == len(set(seen)) == taken * page * shape.lanes
        assert min(seen) >= page and max(seen) < layout.total_rows


def test_the_kinds_of_banks_share_lanes() -> None:
    layout = BankLayout(TWO_AND_FOUR, 10)
    assert [layout.bank_start(bank) for bank in range(6)] == [0, 10, 0, 10, 0, 10]
    rest = torch.tensor([[0, 7, 8]])
    slots = torch.tensor([1, 2])
    assert [layout.bank_rows(bank, slots, rest).tolist() for bank in range(6)] == [
        *([1, 2], [11, 12]),  # full
        *([1, 2], [11, 12], [7, 8], [17, 18]),  # lazy
    ]


def _take_all(pool: FlatPool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    layout = pool.layout
    full = pool.take(layout.full_banks, SHAPE, torch.float32, "cpu") if layout.full_banks else ((), [], [])
    streaming = pool.take(layout.streaming_banks, SHAPE, torch.float32, "cpu")
    assert [*full[0], *streaming[0]] == list(range(layout.layers))
    return full[1] + streaming[1], full[2] + streaming[2]


def test_the_tensors_are_what_and_where_sglang_asked_for() -> None:
    pool = make()
    for banks in (2, 4):
        _, keys, values = pool.take(banks, SHAPE, torch.float8_e4m3fn, "meta")
        assert {(tensor.device.type, tensor.dtype) for tensor in (*keys, *values)} == {
            ("meta", torch.float8_e4m3fn)
        }
    assert pool.kv.k.shape == pool.kv.v.shape == (2 * 10, *SHAPE)
    assert pool.kv.k is not pool.kv.v


def test_the_pools_buffers_are_the_lanes() -> None:
    """A row of bank i is row bank_start(i) + row of the flat tensors, for K and for V."""
    rng = random.Random(2)
    for _ in range(50):
        pool = random_pool(rng)
        layout = pool.layout
        assert pool.complete == (layout.layers == 0)
        keys, values = _take_all(pool)
        assert pool.complete and len(keys) == len(values) == layout.layers
        assert pool.kv.k.shape == pool.kv.v.shape == (layout.total_rows, *SHAPE)
        assert not pool.kv.k.any() and not pool.kv.v.any()
        for bank, (key, value) in enumerate(zip(keys, values, strict=True)):
            assert len(key) == len(value) == layout.rows and key.is_contiguous()
            row = rng.randrange(len(key))
            key[row], value[row] = bank + 1, -bank - 1
            assert (pool.kv.k[layout.bank_start(bank) + row] == bank + 1).all()
            assert (pool.kv.v[layout.bank_start(bank) + row] == -bank - 1).all()


def test_pools_built_in_another_order_or_size_are_refused() -> None:
    for wrong in ([4], [3], [1, 4], [2, 3], [2, 4, 4], [1, 1]):
        pool = make()
        *before, last = wrong
        with pytest.raises(LightTransferError, match="unexpected order or size"):
            for banks in before:
                pool.take(banks, SHAPE, torch.float32, "cpu")
            pool.take(last, SHAPE, torch.float32, "cpu")
        assert pool.complete == (wrong == [2, 4, 4])


def test_more_rows_than_an_index_can_name_are_refused() -> None:
    free = UnitList(4, 1, 1, "cpu")
    shape = UnitShape(1, 1)
    assert BankLayout(shape, MAX_ROWS).total_rows == MAX_ROWS
    FlatPool(BankLayout(shape, MAX_ROWS), free)
    with pytest.raises(LightTransferError, match=r"KV pools: .* lower --mem-fraction-static"):
        FlatPool(BankLayout(shape, MAX_ROWS + 1), free)


def test_rows_are_copied_in_every_lane_of_k_and_v_and_read_first() -> None:
    pool = make()
    _take_all(pool)
    generator = torch.Generator().manual_seed(1)
    for buffer in pool.kv:
        buffer.copy_(torch.rand(buffer.shape, generator=generator))
    before = [buffer.clone() for buffer in pool.kv]
    pool.copy_rows(torch.tensor([7, 2]), torch.tensor([2, 1]))
    for old, new in zip(before, pool.kv, strict=True):
        for lane in (0, 10):
            rows = old.clone()
            old[lane + 7], old[lane + 2] = rows[lane + 2], rows[lane + 1]
        assert torch.equal(old, new)


def _pool(layout_name: str = "nhd", v_dim: int = 4) -> type:
    class StockPool:
        def __init__(self, layers: int, rows: int) -> None:
            self.layer_num, self.rows = layers, rows
            self.kv_cache_layout, self.device, self.store_dtype = layout_name, "cpu", torch.float32
            self.memory_saver_adapter = SimpleNamespace(region=lambda kind: nullcontext())
            self.written: list[tuple[object, ...]] = []
            self._create_buffers_normal()

        def _kv_buffer_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
            return (self.rows, 2, 4), (self.rows, 2, v_dim)

        def _create_buffers_normal(self) -> None:
            raise AssertionError("stock buffers were made")

        def set_kv_buffer(
            self, layer: Any, loc: Any, k: Any, v: Any, k_scale: Any, v_scale: Any, override: Any
        ) -> None:
            rows = loc.tolist() if isinstance(loc, torch.Tensor) else loc
            self.written.append((layer.layer_id, rows, override))

    return StockPool


def test_a_pool_of_sglang_takes_its_buffers_from_the_flat_pool() -> None:
    pool = make()
    made: Any = flat_pool_class(_pool(), pool)
    assert made.__name__ == made.__qualname__ == "FlatStockPool"
    full, streaming = made(2, 10), made(4, 10)
    assert pool.complete and (full.lt_banks, streaming.lt_banks) == (range(2), range(2, 6))
    assert [len(one.k_buffer) for one in (full, streaming)] == [2, 4]
    assert streaming.v_buffer[1].data_ptr() == pool.kv.v[pool.layout.bank_start(3)].data_ptr()
    size = 20 * 8 * 4
    assert full.get_kv_size_bytes() == (size // 3, size // 3), "its share of lanes that both kinds use"
    assert sum(streaming.get_kv_size_bytes()) + sum(full.get_kv_size_bytes()) in range(
        2 * size - 4, 2 * size + 1
    )


def test_a_write_goes_to_the_slots_rows_of_its_layer() -> None:
    """SGLang knows a token by its slot; layers in another of its units have it in another row."""
    pool = make()
    made: Any = flat_pool_class(_pool(), pool)
    made(2, 10)
    streaming = made(4, 10)
    slots = pool.units.take(3, 2)
    rest = pool.units.rest[0, slots]
    for number, rows in ((0, slots), (1, slots), (2, rest), (3, rest)):
        streaming.set_kv_buffer(SimpleNamespace(layer_id=number), slots, None, None)
        assert streaming.written[-1] == (number, rows.tolist(), None)
    assert rest.tolist() != slots.tolist()
    streaming.set_kv_buffer(SimpleNamespace(layer_id=0), slots, None, None, layer_id_override=2)
    assert streaming.written[-1] == (0, rest.tolist(), 2)
    other = SimpleNamespace()
    streaming.set_kv_buffer(SimpleNamespace(layer_id=0), other, None, None)
    assert streaming.written[-1] == (0, other, None), "what is no tensor is SGLang's own affair"


@pytest.mark.parametrize("odd", [{"layout_name": "hnd"}, {"v_dim": 8}])
def test_other_layouts_are_refused(odd: dict[str, Any]) -> None:
    made: Any = flat_pool_class(_pool(**odd), make())
    with pytest.raises(LightTransferError, match="NHD layout"):
        made(2, 10)
