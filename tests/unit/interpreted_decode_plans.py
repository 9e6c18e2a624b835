"""Decode plans made on the device, under Triton's interpreter, against loops; test_kernels.py runs this."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lt_sglang.attention.decode_plan import CHUNKS_PER_PLACE, DecodePlan, decode_plans, plan_bytes
from lt_sglang.attention.flashinfer_private import PrefillPlanInfo, plan_info
from lt_sglang.attention.kernels.decode_plans import LONG_TOKENS, START_TOKENS
from lt_sglang.errors import LightTransferError


def expected_plan(lengths: list[int], plan: DecodePlan) -> tuple[int, list[tuple[int, int]], list[int]]:
    """The chunk size, (request, chunk) pairs in order, o_indptr."""
    lengths = [max(length, 1) for length in lengths]
    tokens, parts = sum(lengths), [*range(1, 17), *(int(16 * 2 ** (i / 8)) for i in range(1, 49))]
    best = (math.inf, 0)
    for size in [max(-(-max(lengths) // part), 128) for part in parts]:
        count = sum(-(-length // size) for length in lengths)
        even = count * size < 1.15 * tokens
        if even:
            time = -(-count // plan.places) * (size + START_TOKENS)
        else:
            time = (tokens + count * START_TOKENS) / plan.places + 0.7 * size
        many = even and max(lengths) >= LONG_TOKENS
        if count <= (plan.chunks if many else plan.uneven_chunks) and time < best[0]:
            best = (time, size)
    size = best[1]
    whole = [(request, tile) for request, length in enumerate(lengths) for tile in range(length // size)]
    rest = [(request, length // size) for request, length in enumerate(lengths) if length % size]
    return size, whole + rest, [0, *itertools.accumulate(-(-length // size) for length in lengths)]


@pytest.mark.parametrize(
    ("lengths", "chunks", "uneven"),
    [
        ([[5], [1]], 4, 4),
        ([[32768], [1024]], 33, 33),
        ([[40, 3000, 1, 1024, 128, 129], [40, 1024, 1, 3000, 128, 129]], 12, 10),
        ([[1024] * 12, [32768] * 6 + [1024] * 6, [32768] * 12], 144, 110),
        ([[7] * 21, [100000] + [1] * 20], 24, 24),
        ([[900 + i for i in range(17)]], 300, 100),
        ([[4500] * 50, [4000] * 50], 400, 149),
    ],
)
def test_decode_plans(lengths: list[list[int]], chunks: int, uneven: int) -> None:
    """Every layer gets the plan of its own lists, whatever was there before."""
    requests, layers = len(lengths[0]), len(lengths)
    plan = DecodePlan(requests, chunks, tile=16, places=33, partial_bytes=0, uneven_chunks=uneven)
    every = itertools.accumulate(length for layer in lengths for length in layer)
    pointers = torch.tensor([0, *every], dtype=torch.int32)
    out = torch.randint(0, 255, (layers, plan.end + 64), dtype=torch.uint8)
    before = out.clone()
    decode_plans(out, pointers, plan)
    assert torch.equal(out[:, plan.end :], before[:, plan.end :])
    for layer, given in enumerate(lengths):
        size, pairs, indptr = expected_plan(given, plan)

        def read(offset: int, count: int, row: torch.Tensor = out[layer]) -> list[int]:
            return row[offset : offset + 4 * count].view(torch.int32).tolist()

        assert read(plan.at.chunk_size, 1) == [size]
        assert read(plan.at.total_rows, 1) == [requests]
        assert list(zip(read(0, len(pairs)), read(plan.at.kv_tiles, len(pairs)), strict=True)) == pairs
        assert read(plan.at.query_tiles, chunks) == [0] * chunks
        assert read(plan.at.o_indptr, requests + 1) == read(plan.at.merge_indptr, requests + 1) == indptr
        valid = out[layer, plan.at.valid : plan.at.valid + chunks].tolist()
        assert valid == [1] * len(pairs) + [0] * (chunks - len(pairs))


def test_lists_of_one_length_are_cut_into_more_rounds() -> None:
    """168 lists of 16K would take six rounds of 33 where 5.1 would do; with few chunks they are not cut."""
    lengths = [16484] * 168 + [1] * 24  # a graph of 192 requests
    info = DecodePlan(192, 600, tile=16, places=33, partial_bytes=0, uneven_chunks=300).info
    plan = DecodePlan.like(info, 192, heads=32, kv_heads=8, dim=128, processors=132)
    assert (plan.chunks, plan.uneven_chunks) == (16 * 33, 3 * 33 + 192)
    size, pairs, _ = expected_plan(lengths, plan)
    assert size == 5495 and len(pairs) == 3 * 168 + 24
    assert len(expected_plan(lengths, replace(plan, chunks=plan.uneven_chunks))[1]) == 192
    # Few requests were cut before; of very many each is a small part of a round.
    for requests, chunks in ((12, 111), (47, 188), (640, 739)):
        assert (
            DecodePlan.like(
                replace_rows(info, requests), requests, heads=32, kv_heads=8, dim=128, processors=132
            ).chunks
            == chunks
        )
    # Lists that differ have no more chunks than before.
    mixed = [16484] * 42 + [1024] * 124 + [1] * 26
    assert expected_plan(mixed, plan) == expected_plan(mixed, replace(plan, chunks=plan.uneven_chunks))


@pytest.mark.parametrize(
    ("requests", "length", "chunks"), [(168, 16384, 504), (177, 8192, 354), (168, 1024, 168), (47, 1024, 94)]
)
def test_windows_are_not_cut_into_more_rounds(requests: int, length: int, chunks: int) -> None:
    """168 of 1K took 213 us when cut, 198 when not (2026-11-30-h200-decode-plan.json); long lists gain."""
    info = DecodePlan(requests, 600, tile=16, places=33, partial_bytes=0, uneven_chunks=300).info
    plan = DecodePlan.like(info, requests, heads=32, kv_heads=8, dim=128, processors=132)
    assert len(expected_plan([length] * requests, plan)[1]) == chunks


def replace_rows(info: PrefillPlanInfo, requests: int) -> PrefillPlanInfo:
    return info._replace(total_num_rows=requests)


def test_decode_plans_that_do_not_fit_are_refused() -> None:
    plan = DecodePlan(1, 33, tile=16, places=33, partial_bytes=0, uneven_chunks=33)
    with pytest.raises(LightTransferError, match="does not fit"):
        decode_plans(
            torch.zeros((2, plan.end - 16), dtype=torch.uint8), torch.zeros(3, dtype=torch.int32), plan
        )


def test_plans_of_another_form_are_refused() -> None:
    info = DecodePlan(7, 33, tile=16, places=33, partial_bytes=256, uneven_chunks=33).info
    plan = DecodePlan.like(info, 7, heads=32, kv_heads=8, dim=128, processors=132)
    assert plan.places == 33 and plan.chunks == CHUNKS_PER_PLACE * 33 + 7 and plan.tile == 16
    assert plan.uneven_chunks == plan.chunks
    assert plan.partial_bytes == 32 * plan.chunks * 128 * 4
    assert plan.end <= plan_bytes(7, kv_heads=8, processors=132) <= plan_bytes(8, kv_heads=8, processors=132)
    assert plan_info(SimpleNamespace(_plan_info=list(info))) == info
    with pytest.raises(LightTransferError, match="is no PrefillPlanInfo"):
        plan_info(SimpleNamespace(_plan_info=list(info[:10])))
    eager = PrefillPlanInfo(*info[:13], 0, 1)
    for other, requests, heads, kv_heads in ((eager, 7, 32, 8), (info, 8, 32, 8), (info, 7, 64, 2)):
        with pytest.raises(LightTransferError, match="not of the known form"):
            DecodePlan.like(other, requests, heads=heads, kv_heads=kv_heads, dim=128, processors=132)
