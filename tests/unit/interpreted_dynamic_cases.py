"""Requests in dynamic mode, their tables and plain lists, for interpreted_dynamic_*.py."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from lt_sglang.attention.indices import StreamingTables, Windows
from lt_sglang.attention.kernels.banks import LayerBanks
from lt_sglang.attention.kernels.requests import Requests
from lt_sglang.layers.layer_sets import banks as banks_of
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.banks import BankLayout

LAYERS, KEEP = 7, 3
SINK, RECENT = 4, 12
FULL, STREAMING, SETS = 300, 120, 5
WINDOWS = Windows(SINK, RECENT, sink_base=STREAMING + 1)


LAYOUT = BankLayout(
    full_banks=KEEP,
    streaming_banks=LAYERS - KEEP,
    full_rows=FULL + 1,
    streaming_rows=STREAMING + 1 + SETS * SINK,
    staging_rows=90,
    scratch_rows=128,
    sink_base=STREAMING + 1,
)


class World:
    """Requests of given lengths with random slots, sink sets and layer sets."""

    def __init__(self, rng: random.Random, lengths: list[int]) -> None:
        self.lengths = lengths
        count = len(lengths)
        self.rows = torch.tensor(rng.sample(range(1, 20), count), dtype=torch.int64)
        slots = iter(rng.sample(range(1, FULL + 1), sum(lengths)))
        streaming = iter(rng.sample(range(1, STREAMING + 1), STREAMING))
        self.req_to_token = torch.zeros((20, 256), dtype=torch.int32)
        self.full_to_streaming = torch.zeros(FULL + 2, dtype=torch.int64)
        self.sink_set_of = torch.full((20,), -1, dtype=torch.int32)
        for index, (row, length) in enumerate(zip(self.rows.tolist(), lengths, strict=True)):
            taken = [next(slots) for _ in range(length)]
            self.req_to_token[row, :length] = torch.tensor(taken, dtype=torch.int32)
            if index < SETS and rng.random() < 0.7:
                self.sink_set_of[row] = index
            for position, slot in enumerate(taken):
                sink = position < SINK and self.sink_set_of[row] < 0
                if sink or position >= length - RECENT - 3:
                    self.full_to_streaming[slot] = next(streaming)
        self.bank_of = torch.full((12, LAYERS), -1, dtype=torch.int32)
        self.set_of = torch.zeros(20, dtype=torch.int32)
        sets = rng.sample(range(12), count)
        for row, chosen in zip(self.rows.tolist(), sets, strict=True):
            lazy = sorted(rng.sample(range(LAYERS), LAYERS - KEEP))
            table = banks_of(lazy, LAYERS)
            self.bank_of[chosen] = torch.tensor(table, dtype=torch.int32)
            self.set_of[row] = chosen
        self.tables = StreamingTables(self.req_to_token, self.full_to_streaming, self.sink_set_of)
        self.banks = LayerBanks(self.bank_of, self.set_of, LAYOUT, WINDOWS)

    def full(self, index: int) -> list[int]:
        return self.req_to_token[self.rows[index], : self.lengths[index]].tolist()

    def bank(self, index: int, layer: int) -> int:
        return int(self.bank_of[self.set_of[self.rows[index]], layer])

    def streaming(self, index: int) -> list[int]:
        return [int(self.full_to_streaming[slot]) for slot in self.full(index)]


@dataclass
class Chunk:
    """A prefill batch over a world; the facts the kernels get."""

    world: World
    plans: list[Prefill]

    def requests(self) -> Requests:
        facts: list[list[int]] = []
        token = offset = deciding = 0
        for plan in self.plans:
            number = deciding if plan.kind == Kind.SELECT else -1
            facts.append([int(plan.kind), plan.layer_set, plan.prefix, token, offset, number])
            token, offset, deciding = token + plan.extend, offset + plan.end, deciding + (number >= 0)
        table = torch.tensor(facts, dtype=torch.int32).t().contiguous()
        full = [slot for index in range(len(self.plans)) for slot in self.world.full(index)]
        streaming = [slot for index in range(len(self.plans)) for slot in self.world.streaming(index)]
        sink = self.world.sink_set_of[self.world.rows]
        slots = (torch.tensor(full, dtype=torch.int32), torch.tensor(streaming, dtype=torch.int32))
        return Requests(*table[:5], sink, table[5], *slots)


def chunk(seed: int, short: bool) -> Chunk:
    rng = random.Random(seed)
    shapes = [(0, 30), (20, 45), (33, 50), (10, 26), (0, 9)]
    kinds = [Kind.SELECT, Kind.SELECT, Kind.STAGED, Kind.KNOWN, Kind.KNOWN]
    if short:  # decided requests that have not left their windows
        shapes[3] = (9, 15)
    world = World(rng, [end for _, end in shapes])
    plans = []
    for index, ((prefix, end), kind) in enumerate(zip(shapes, kinds, strict=True)):
        row = int(world.rows[index])
        plans.append(Prefill(kind, row, int(world.set_of[row]), prefix, end - prefix))
    return Chunk(world, plans)
