"""The GPU backend of dynamic mode against the CPU one, batch by batch; test_kernels.py runs this.

Triton kernels run under the interpreter, FlashInfer's wrappers are replaced by loops that read the same
buffers, and both backends get the same queries, keys and values, slots and plans. What must agree: outputs,
every row of memory that is ever read, layer tables and scores.
"""

from __future__ import annotations

import pytest

from lt_sglang.attention.dynamic_prefill import GatheredCall
from lt_sglang.layers.prefill import Kind

from .interpreted_dynamic_world import KEEP, LAYERS, Request, World


@pytest.mark.parametrize(
    ("score", "seed", "draw"),
    [
        ("lighttransfer", 0, 0),
        ("lighttransfer", 3, 0),
        ("lighttransfer", 5, 0),
        ("lighttransfer", 7, 2),
        ("residual-error", 1, 1),
        ("squeeze", 2, 2),
        ("list", 4, 0),
    ],
)
def test_backends_agree(score: str, seed: int, draw: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staged, decided, inherited and short requests in all the company they can meet.

    seed: which way of attending over a prefix. draw: numbers that leave the scores far apart.
    """
    world = World(seed, score, monkeypatch, draw)
    a, b, c, d, e, f = (
        Request(row, layer_set) for row, layer_set in ((1, 3), (2, 4), (5, 7), (4, 0), (9, 0), (11, 8))
    )
    meta = world.prefill([(Kind.STAGED, a, 40, 0), (Kind.SELECT, b, 30, 6), (Kind.SELECT, f, 22, 6)])
    assert not meta.windowed and meta.prefix_kv_indices is None
    # The end of a staged prompt is shorter than the queries that are scored; the next is staged beside it.
    meta = world.prefill([(Kind.SELECT, a, 3, 6), (Kind.STAGED, c, 20, 0), (Kind.KNOWN, d, 10, 0)])
    assert not meta.windowed and meta.prefix_kv_indices is not None
    world.slide(a, 1)
    world.slide(b, 2)
    world.decode([a, b, d, f])
    world.share(e, b, 28)
    # Staged, inherited and new requests in one batch: full and windowed attention in every layer.
    new = Request(13, 9)
    meta = world.prefill([(Kind.SELECT, c, 15, 6), (Kind.KNOWN, e, 25, 0), (Kind.SELECT, new, 19, 6)])
    assert meta.windowed
    assert isinstance(meta.full, GatheredCall) == (seed in (1, 3)) and (meta.full is None) == (seed in (5, 7))
    assert isinstance(meta.lazy, GatheredCall) == (seed in (1, 3, 7))
    # A chunk that decides early, and the one behind it.
    early = Request(14, 10)
    world.prefill([(Kind.SELECT, early, 30, 12)])
    meta = world.prefill([(Kind.KNOWN, early, 9, 0), (Kind.STAGED, Request(15, 11), 20, 0)])
    assert meta.windowed
    world.decode([a, b, c, d, e, new, early])
    # Short requests with a cached prefix.
    short = Request(3, 0)
    world.share(short, d, 9)
    meta = world.prefill([(Kind.KNOWN, short, 4, 0)])
    assert not meta.windowed
    for step in range(4):
        world.decode([short, e, a], graph=step > 0)
    world.decode([a, b, c, d, e, new, early], graph=True)
    if score != "list":
        assert len({tuple(row) for row in world.cuda_state.sets.bank_of.tolist()}) > 3, "sets differ"
        return
    for layer_set in (3, 4, 7, 8, 9, 10):
        banks = world.cuda_state.sets.bank_of[layer_set].tolist()
        assert [layer for layer, bank in enumerate(banks) if bank >= KEEP] == [0, 1, 2]


@pytest.mark.parametrize("score", ["lighttransfer", "residual-error"])
def test_a_retracted_request_gets_the_layers_it_had(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be another prompt's, inherited with a cached prefix: its own scores must not count.

    In one chunk, over staged chunks, and beside requests that are scored, in both ways.
    """
    world = World(1, score, monkeypatch, 1)
    whole, chunked, scored, scored_chunk = (
        Request(row, layer_set) for row, layer_set in ((1, 3), (2, 4), (5, 7), (6, 8))
    )
    had = {}
    for order, request in enumerate((whole, chunked)):
        lazy = set(range(order, order + LAYERS - KEEP))
        had[request.layer_set] = tuple(
            10.0 + layer if layer in lazy else layer / 10 for layer in range(LAYERS)
        )
    world.prefill([(Kind.STAGED, chunked, 20, 0), (Kind.SELECT, scored, 25, 6)], had)
    world.prefill(
        [(Kind.SELECT, whole, 30, 6), (Kind.SELECT, chunked, 9, 6), (Kind.STAGED, scored_chunk, 12, 0)], had
    )
    world.prefill([(Kind.SELECT, scored_chunk, 11, 6)], had)
    for order, request in enumerate((whole, chunked)):
        banks = world.torch_state.sets.bank_of[request.layer_set].tolist()
        lazy_now = [layer for layer, bank in enumerate(banks) if bank >= KEEP]
        assert lazy_now == list(range(order, order + LAYERS - KEEP))
        told = world.torch_state.sets.laziness[request.layer_set].tolist()
        assert told == pytest.approx(had[request.layer_set])
    world.decode([whole, chunked, scored, scored_chunk])


def test_an_undecided_prompt_holds_every_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows written, counted: one a token and layer, staged or not; nothing is written beside them."""
    world = World(4, "lighttransfer", monkeypatch)
    pool = world.cuda_state.pool.kv
    for tensor in (*pool, *world.torch_state.pool.kv):
        tensor.fill_(7.0)

    def written() -> int:
        return int((pool.k != 7.0).flatten(1).any(1).sum())

    request = Request(1, 3)
    world.prefill([(Kind.STAGED, request, 40, 0)])
    assert written() == LAYERS * 40
    world.prefill([(Kind.SELECT, request, 20, 6)])
    assert written() == LAYERS * 60
