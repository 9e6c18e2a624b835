"""lt_sglang.memory.units: shapes, and the list of free units by random round trips."""

from __future__ import annotations

import random
from math import gcd

import pytest
import torch

from lt_sglang.memory.units import UnitList, UnitShape


def test_every_shape_of_up_to_40_layers() -> None:
    """Banks of one kind share no (lane, unit of a token), and fill all of both."""
    for layers in range(1, 41):
        for full in range(layers):
            shape = UnitShape(full, layers - full)
            assert shape.layers == layers
            assert shape.lanes == gcd(full, layers - full)
            assert shape.full_units * shape.lanes == full
            assert shape.streaming_units * shape.lanes == layers - full
            assert shape.parts == max(shape.full_units, shape.streaming_units) >= 1
            for banks, units in (
                (range(full), shape.full_units),
                (range(full, layers), shape.streaming_units),
            ):
                places = [(shape.lane_of(bank), shape.part_of(bank)) for bank in banks]
                assert sorted(places) == [
                    (lane, part) for lane in range(shape.lanes) for part in range(units)
                ]


@pytest.mark.parametrize(
    ("full", "lazy", "lanes", "full_units", "streaming_units"),
    [
        (16, 16, 16, 1, 1),
        (8, 24, 8, 1, 3),
        (24, 8, 8, 3, 1),
        (5, 3, 1, 5, 3),
        (0, 6, 6, 0, 1),
        (1, 5, 1, 1, 5),
    ],
)
def test_units_of_a_page(full: int, lazy: int, lanes: int, full_units: int, streaming_units: int) -> None:
    shape = UnitShape(full, lazy)
    assert (shape.lanes, shape.full_units, shape.streaming_units) == (lanes, full_units, streaming_units)
    assert shape.units(7, 2) == 7 * full_units + 2 * streaming_units


def test_all_units_but_the_padding_are_free_at_first() -> None:
    units = UnitList(6, 4, 3, "cpu")
    assert units.free.tolist() == [1, 2, 3, 4, 5, 6] and len(units) == 6
    assert units.rows == 28 and units.rest.shape == (2, 28) and units.rest.dtype == torch.int32
    units.take(2, 3)
    units.clear()
    assert units.free.tolist() == [1, 2, 3, 4, 5, 6]


def test_the_tables_are_where_they_are_said_to_be() -> None:
    units = UnitList(6, 1, 2, "meta")
    assert {units.free.device.type, units.rest.device.type} == {"meta"}
    assert UnitList(6, 1, 1, "cpu").rest.shape == (0, 7), "tokens of one unit need no table"


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_take_and_give(page: int, parts: int) -> None:
    """Whoever takes and gives in any order: no unit twice, none lost; a token is in its own units."""
    rng = random.Random(page * 10 + parts)
    units = UnitList(60, page, parts, "cpu")
    held: list[tuple[torch.Tensor, int, list[int]]] = []
    for _ in range(300):
        if held and (rng.random() < 0.5 or len(units) < parts):
            first, of, owned = held.pop(rng.randrange(len(held)))
            order = torch.randperm(len(first))
            before = len(units)
            units.give(first[order], of)
            assert sorted(units.free[before:].tolist()) == owned
        else:
            of = rng.randint(1, parts)
            pages = rng.randint(0, len(units) // of)
            expected = units.free[: pages * of].tolist()
            first = units.take(pages, of)
            assert first.dtype == torch.int64 and len(first) == pages
            slots = (first[:, None] * page + torch.arange(page)).flatten()
            rows = units.rows_in_parts(slots, of)
            assert rows.shape == (of, pages * page) and torch.equal(rows[0], slots)
            assert (rows % page == slots % page).all(), "a token is at the same place of each of its units"
            owned = (rows.view(of, pages, page)[:, :, 0] // page).flatten().tolist()
            assert sorted(owned) == sorted(expected)
            held.append((first, of, sorted(owned)))
        taken = [unit for _, _, owned in held for unit in owned]
        assert sorted(units.free.tolist() + taken) == list(range(1, 61))
        for first, of, owned in held:
            rows = units.rows_in_parts(first * page, of)
            assert sorted((rows // page).flatten().tolist()) == owned, "another's take changed it"


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which units they are is known on the device alone."""

    def fail(*given: object) -> None:
        raise AssertionError("read on the host")

    for name in ("item", "tolist", "__int__", "__bool__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    units = UnitList(40, 4, 3, "cpu")
    first = units.take(5, 3)
    units.take(2, 1)
    units.give(first, 3)
    assert len(units) == 38
