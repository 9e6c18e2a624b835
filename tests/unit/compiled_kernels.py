"""Compiles every Triton kernel for a GPU that is not here; prints their names. test_kernels.py runs this.

The interpreter takes arguments that the compiler does not: a NamedTuple with a field ``values``, for one.

    python tests/unit/compiled_kernels.py 90
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lt_sglang.attention.decode_plan import DecodePlan, decode_plans
from lt_sglang.attention.indices import StreamingTables, Windows
from lt_sglang.attention.kernels import decode_dynamic, decode_static, extend_dynamic
from lt_sglang.attention.kernels.banks import LayerBanks
from lt_sglang.attention.kernels.merge_sinks import BankColumn, Scales, Sinks, make_sink_tiles, merge_sinks
from lt_sglang.attention.kernels.place import exchange, store_new
from lt_sglang.attention.kernels.requests import Requests
from lt_sglang.attention.kernels.store import store_kv
from lt_sglang.attention.kernels.tiles import make_tiles
from lt_sglang.identify import queue_kernel
from lt_sglang.identify.scores import attend_kernel, mass_kernel, row_kernels
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.memory.banks import BankLayout
from lt_sglang.memory.kv import KV
from lt_sglang.memory.units import UnitShape

LAYERS = 32
TOKENS, HEADS, KV_HEADS, DIM = 96, 32, 8, 128
WINDOWS = Windows(4, 1020)
# Tokens of one unit, and of several: kernels differ.
LAYOUTS = [BankLayout(UnitShape(keep, LAYERS - keep), 300000) for keep in (16, 8, 13)]


class Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(
    kernel: JITFunction, *args: Any, warmup: bool, _run: Any = JITFunction.run, **kwargs: Any
) -> Any:
    """In place of JITFunction.run."""
    compiled = _run(kernel, *args, warmup=True, **kwargs)
    assert compiled.asm["cubin"]
    print("COMPILED", kernel.fn.__name__)
    return compiled


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def longs(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def attention() -> None:
    """Kernels of both modes."""
    fused = torch.zeros(TOKENS, (HEADS + 2 * KV_HEADS) * DIM, dtype=torch.bfloat16)
    query, *new = fused.view(TOKENS, -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    pool = KV(*(torch.zeros(64, KV_HEADS, DIM, dtype=torch.bfloat16) for _ in range(2)))
    tables = StreamingTables(ints(64, 32768), longs(1000), ints(64), ints(9, 4))
    store_kv(pool, ints(TOKENS), KV(*new))
    decode_static.decode_kv_indices(ints(1000), ints(5), ints(4), ints(4), tables, WINDOWS)
    out, lse = torch.zeros(TOKENS, HEADS, DIM, dtype=torch.bfloat16), torch.zeros(TOKENS, HEADS)
    sinks = Sinks(longs(1, 4), make_sink_tiles([2000], [TOKENS], WINDOWS, "cpu"), WINDOWS)
    merge_sinks(out, lse, query, pool, sinks, Scales(0.1))
    plan = DecodePlan(4, 400, 16, 33, 1 << 20, 200)
    decode_plans(torch.zeros(LAYERS, plan.end + 64, dtype=torch.uint8), ints(LAYERS * 4 + 1), plan)
    for layout in LAYOUTS:
        rest = ints(layout.shape.parts - 1, 1000)
        banks = LayerBanks(ints(4100, LAYERS), ints(64), layout, rest, WINDOWS)
        dynamic(pool, KV(*new), tables, banks)
        column = BankColumn.of_layer(banks, ints(4, LAYERS)[:, 3])
        of_banks = (column, layout.shape)
        merge_sinks(out, lse, query, pool, sinks, Scales(0.1), window=out.clone(), banks=of_banks)


def dynamic(pool: KV, new: KV, tables: StreamingTables, banks: LayerBanks) -> None:
    """Kernels that read the layer table."""
    given = Requests(*(ints(4) for _ in range(5)), ints(4, 4), ints(4), ints(100), ints(100))
    tiles, firsts, ends = make_tiles([(0, 0, 50)], 8, "cpu"), [0] * 4, [20] * 4
    store_new(pool, new, 17, tiles, given, banks)
    exchange(pool, 17, tiles, given, banks, ints(4))
    for lazy in (False, True):
        kv_indptr = extend_dynamic.extend_kv_indptr(banks, given, ints(4), lazy=lazy)
        extend_dynamic.extend_kv_indices(banks, given, firsts, ends, kv_indptr, lazy=lazy)
    extend_dynamic.every_kv_indices(banks, given, firsts, ends)
    kv_indptr = ints(LAYERS * 4 + 1)
    decode_dynamic.decode_kv_indptr(kv_indptr, banks, ints(4), ints(4))
    decode_dynamic.decode_kv_indices(ints(1000), kv_indptr, banks, tables, ints(4), ints(4), longest=3000)
    decode_dynamic.decode_out_cache_loc(ints(LAYERS, 4), banks, ints(4), longs(4), longs(4))


def scores() -> None:
    """Kernels that score layers and step the queue."""
    query = torch.zeros(TOKENS, HEADS, DIM, dtype=torch.bfloat16)
    evidence = Evidence(
        query=query,
        attention=query,
        lse=torch.zeros(TOKENS, HEADS),
        keys=query[:, :KV_HEADS],
        values=query[:, :KV_HEADS],
        query_rows=ints(1, 32),
        query_positions=ints(1, 32),
        key_rows=ints(1, TOKENS),
        key_positions=ints(1, TOKENS),
        scale=0.1,
        heads=HEADS,
        total_heads=HEADS,
        hidden=torch.zeros(TOKENS, HEADS * DIM, dtype=torch.bfloat16),
    )
    splits = attend_kernel.attend(evidence, with_values=False)
    mass_kernel.mean_mass(evidence, splits)
    mass_kernel.largest_discarded_mass(evidence, splits)
    row_kernels.output_rows(evidence, attend_kernel.attend(evidence, with_values=True))
    rows, laziness = row_kernels.output_rows(evidence, None)
    row_kernels.negative_ratio(evidence, rows, laziness)
    row_kernels.mean_cosine(evidence, rows)
    sets, laziness = ints(4), torch.zeros(4100, LAYERS)
    queue_kernel.queue_step(ints(4100, LAYERS), laziness, sets, torch.zeros(4), ints(4), 17, 16)


if __name__ == "__main__":
    driver.set_active(Driver(int(sys.argv[1])))
    JITFunction.run = compile_only
    attention()
    scores()
