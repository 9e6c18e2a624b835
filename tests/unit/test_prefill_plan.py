"""What static mode plans for a prefill on a GPU: every list, against the positions it stands for."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lt_sglang.attention import gathered
from lt_sglang.attention.gathered import GatheredAttention
from lt_sglang.attention.parts import DecodeLists, LayerParts
from lt_sglang.attention.static_plans import FULL, LAZY, LazyPrefillUpdater
from lt_sglang.memory.banks import BankLayout
from lt_sglang.memory.kv import KV
from lt_sglang.memory.units import UnitShape
from tests.unit.streaming import Batch, visible

SINK, RECENT = 4, 8
# Tokens before the chunk, and with it: none, less than a window, more, and a chunk of one token.
PREFIXES, LENGTHS = [0, 5, 40, 30], [20, 12, 60, 31]
# Three full and two lazy layers: a token takes three units, or two in a window. Layers 1 and 3 are lazy.
REST = torch.randperm(400).view(2, 200).to(torch.int32)
SHAPE = UnitShape(3, 2)
FLAT: Any = SimpleNamespace(layout=BankLayout(SHAPE, 200), units=SimpleNamespace(rest=REST))
PARTS = LayerParts(FLAT, (1, 3))


class Recorder:
    """A FlashInfer wrapper that only remembers its plan."""

    def begin_forward(self, *given: Any, **options: Any) -> None:
        self.given, self.options = given, options

    def spans(self) -> list[list[int]]:
        indptr, rows = self.given[1], self.given[2]
        return [part.tolist() for part in rows.split(indptr.diff().tolist())]


class Prefix:
    """PrefixAttention that only remembers its plan."""

    planned: tuple[list[int], list[int]] | None = None

    def __init__(self, kernels: str) -> None:
        self._kernels = kernels

    def kernels(self, updater: Any) -> str:
        return self._kernels

    def plan(self, updater: Any, extends: list[int], prefixes: list[int]) -> None:
        self.planned = extends, prefixes


class Gathered:
    """GatheredAttention that only remembers its plan."""

    planned: tuple[list[int], list[int]] | None = None

    def plan(self, updater: Any, extends: list[int], spans: list[int]) -> None:
        self.planned = extends, spans

    def lists(self, rows: torch.Tensor) -> list[list[int]]:
        assert self.planned is not None
        return [part.tolist() for part in rows.split(self.planned[1])]


def plan(
    prefixes: list[int], use_ragged: bool, kernels: str = "fa2"
) -> tuple[Batch, Recorder, list[Recorder], Any]:
    batch = Batch(random.Random(2), SINK, RECENT, LENGTHS, captured=False)
    ragged, paged = Recorder(), [Recorder(), Recorder()]
    updater: Any = object.__new__(LazyPrefillUpdater)
    updater.runner = SimpleNamespace(windows=lambda: batch.windows, streaming_tables=lambda: batch.tables)
    updater.attn_backend = SimpleNamespace(
        prefill="of the batch before",
        prefix=Prefix(kernels),
        whole=Gathered(),
        window=Gathered(),
        parts=PARTS,
    )
    updater.prefill_wrapper_ragged = ragged
    updater.num_qo_heads, updater.num_kv_heads, updater.head_dim = 4, 2, 16
    updater.data_type = updater.q_data_type = torch.float32
    updater.update_sliding_window(
        batch.rows,
        batch.lengths,
        batch.lengths,
        int(batch.lengths.sum()),
        torch.tensor(prefixes),
        prefill_wrappers=paged,
        use_ragged=use_ragged,
        encoder_lens=None,
        spec_info=None,
        extend_prefix_lens_cpu=prefixes,
        plan=None,
    )
    return batch, ragged, paged, updater.attn_backend


def windows_of(batch: Batch) -> list[list[int]]:
    """Slots of the window before each chunk and the chunk."""
    firsts = [max(prefix - (RECENT - 1), 0) for prefix in PREFIXES]
    return [
        [batch.slot_of_position(i, j) for j in range(first, end)]
        for i, (first, end) in enumerate(zip(firsts, LENGTHS, strict=True))
    ]


def full_slots(batch: Batch, index: int, end: int) -> list[int]:
    return batch.tables.req_to_token[batch.rows[index], :end].tolist()


def test_full_layers_read_the_cached_prefix_and_new_tokens_ragged() -> None:
    batch, ragged, paged, backend = plan(PREFIXES, use_ragged=True)
    extends = [length - prefix for length, prefix in zip(LENGTHS, PREFIXES, strict=True)]
    assert ragged.given[0].diff().tolist() == ragged.given[1].diff().tolist() == extends
    assert ragged.options["causal"] is True
    assert backend.prefix.planned == (extends, PREFIXES)
    expected = [slot for i, end in enumerate(PREFIXES) for slot in full_slots(batch, i, end)]
    assert backend.prefill.prefix[0].tolist() == expected and backend.prefill.whole is None
    assert len(backend.prefill.prefix) == 3
    assert not hasattr(paged[FULL], "given")


def test_without_ragged_full_layers_read_everything_causally() -> None:
    batch, ragged, paged, backend = plan(PREFIXES, use_ragged=False)
    assert not hasattr(ragged, "given") and backend.prefill.prefix is None
    assert paged[FULL].spans() == [full_slots(batch, i, end) for i, end in enumerate(LENGTHS)]
    assert paged[FULL].options["causal"] is True and paged[FULL].options["window_left"] == -1


def test_nothing_cached_is_nothing_paged() -> None:
    _, ragged, paged, backend = plan([0, 0, 0, 0], use_ragged=True)
    assert ragged.given[0].diff().tolist() == LENGTHS
    assert not hasattr(paged[FULL], "given")
    assert backend.prefix.planned is None and backend.prefill.prefix is None


@pytest.mark.parametrize("use_ragged", [True, False])
def test_lazy_layers_read_the_window_before_the_chunk_and_the_chunk(use_ragged: bool) -> None:
    batch, _, paged, backend = plan(PREFIXES, use_ragged)
    assert paged[LAZY].spans() == windows_of(batch) and backend.prefill.window_paged
    assert paged[LAZY].options["causal"] is True and paged[LAZY].options["window_left"] == RECENT - 1
    first, second = backend.prefill.sinks
    assert first.slots.shape == (len(LENGTHS), SINK)
    assert torch.equal(second.slots, REST[0][first.slots].to(second.slots.dtype))


def test_layers_in_other_units_read_lists_of_their_own() -> None:
    _, _, _, backend = plan(PREFIXES, use_ragged=True, kernels="fa3")
    for lists in (backend.prefill.whole, backend.prefill.window):
        for number, rows in enumerate(lists[1:]):
            assert torch.equal(rows, REST[number][lists[0].long()]) and rows.dtype == torch.int32
    assert [PARTS.of(layer) for layer in range(5)] == [0, 0, 1, 1, 2], "full: 0, 2, 4; lazy: 1, 3"


@pytest.mark.parametrize("graph", [True, False])
def test_decode_lists_of_other_units(graph: bool) -> None:
    slots = torch.randperm(190)[:50].to(torch.int32)
    lists, wrapper = DecodeLists(PARTS, 3), SimpleNamespace()
    if graph:
        buffer = torch.zeros(80, dtype=torch.int32)
        buffer[:50] = slots
        lists.init_graphs(buffer)
        slots = buffer
    seen = {}
    for _ in range(2):  # a graph reads where it was captured
        lists.fill(slots, 50, graph=graph)
        for layer, part in ((0, 0), (2, 1), (4, 2)):
            lists.use(wrapper, layer)
            read = wrapper._paged_kv_indices_buf
            assert seen.setdefault(layer, read.data_ptr()) == read.data_ptr() or not graph
            wanted = slots[:50] if part == 0 else REST[part - 1][slots[:50].long()]
            assert torch.equal(read[:50], wanted)
    one = DecodeLists(PARTS, 1)
    one.fill(slots, 50, graph=graph)
    one.use(wrapper := SimpleNamespace(), 0)
    assert not vars(wrapper), "a token of one unit needs no other list"


def test_fa3_gathers_for_all_layers() -> None:
    batch, ragged, paged, backend = plan(PREFIXES, use_ragged=True, kernels="fa3")
    extends = [length - prefix for length, prefix in zip(LENGTHS, PREFIXES, strict=True)]
    assert backend.whole.planned[0] == backend.window.planned[0] == extends
    expected = [full_slots(batch, i, end) for i, end in enumerate(LENGTHS)]
    assert backend.whole.lists(backend.prefill.whole[0]) == expected
    assert backend.window.lists(backend.prefill.window[0]) == windows_of(batch)
    assert not any(hasattr(wrapper, "given") for wrapper in [ragged, *paged])
    assert backend.prefix.planned is None and backend.prefill.prefix is None


def test_fa3_does_not_copy_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = sum(len(rows) for rows in windows_of(plan(PREFIXES, use_ragged=True)[0]))
    assert windows < sum(LENGTHS)
    row_bytes = 2 * 2 * 16 * 2  # of both, 2 KV heads of 16
    monkeypatch.setattr(gathered, "GATHER_BYTES", windows * row_bytes)
    _, ragged, paged, backend = plan(PREFIXES, use_ragged=True, kernels="fa3")
    assert backend.prefill.whole is None and backend.prefix.planned and hasattr(ragged, "given")
    assert not backend.prefill.window_paged and not hasattr(paged[LAZY], "given")
    monkeypatch.setattr(gathered, "GATHER_BYTES", windows * row_bytes - 1)
    *_, paged, backend = plan(PREFIXES, use_ragged=True, kernels="fa3")
    assert backend.prefill.window_paged and hasattr(paged[LAZY], "given")


class Dense:
    """FlashInfer's ragged wrapper on FA3, in loops; the plan's ``causal`` is but a hint."""

    def __init__(self, *_: Any, **options: Any) -> None:
        assert options["backend"] == "fa3"

    def begin_forward(self, qo: torch.Tensor, kv: torch.Tensor, *_: Any, **options: Any) -> None:
        self.qo, self.kv, self.planned = qo.tolist(), kv.tolist(), options
        assert options["causal"] == (options["window_left"] < 0), "windowed queries are all the same work"

    def forward_return_lse(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert options["causal"] and options["window_left"] == self.planned["window_left"]
        assert len(keys) == len(values) == self.kv[-1]
        out, lse = torch.zeros_like(query), torch.zeros(query.shape[:2])
        window = options["window_left"] + 1 or len(keys)
        for index, first in enumerate(self.qo[:-1]):
            own = slice(self.kv[index], self.kv[index + 1])
            new, length = self.qo[index + 1] - first, self.kv[index + 1] - self.kv[index]
            for number in range(new):
                seen = visible(length - new + number, 0, window)
                scores = torch.einsum("hd,khd->hk", query[first + number], keys[own][seen])
                scores = scores * options["sm_scale"]
                lse[first + number] = scores.logsumexp(1) / torch.log(torch.tensor(2.0))
                out[first + number] = torch.einsum("hk,khd->hd", scores.softmax(1), values[own][seen])
        return out, lse


@pytest.mark.parametrize("window_left", [-1, RECENT - 1])
@pytest.mark.parametrize("prefixes", [PREFIXES, [0, 0, 0, 0]])
def test_gathered_attention_is_that_of_the_tokens(
    prefixes: list[int], window_left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered, "BatchPrefillWithRaggedKVCacheWrapper", Dense)
    torch.manual_seed(1)
    attention = GatheredAttention(torch.empty(1), window_left)
    extends = [length - prefix for length, prefix in zip(LENGTHS, prefixes, strict=True)]
    before = [prefix if window_left < 0 else min(prefix, window_left) for prefix in prefixes]
    spans = [extend + seen for extend, seen in zip(extends, before, strict=True)]
    keys, values = torch.randn(200, 2, 16), torch.randn(200, 2, 16)
    rows = torch.randperm(200)[: sum(spans)]
    new = [part.tolist()[-extend:] for part, extend in zip(rows.split(spans), extends, strict=True)]
    new_rows = torch.tensor([row for part in new for row in part])
    query = torch.randn(sum(extends), 2, 16)
    updater = SimpleNamespace(num_qo_heads=2, num_kv_heads=2, head_dim=16, q_data_type=None)
    attention.plan(updater, extends, spans)
    layer = SimpleNamespace(scaling=0.25, logit_cap=0.0)
    projected, cache = KV(keys[new_rows], values[new_rows]), KV(keys, values)
    out, lse = attention.run(query, projected, cache, rows, layer)
    again, _ = attention.run(query, None, cache, rows, layer)
    torch.testing.assert_close(again, out)  # new tokens are read where they were stored, if not as projected
    token = 0
    for part, extend in zip(rows.split(spans), extends, strict=True):
        for number in range(extend):
            position = len(part) - extend + number
            seen = part[visible(position, 0, window_left + 1 or 200)]
            scores = torch.einsum("hd,khd->hk", query[token], keys[seen]) * 0.25
            expected = torch.einsum("hk,khd->hd", scores.softmax(1), values[seen])
            torch.testing.assert_close(out[token], expected)
            torch.testing.assert_close(lse[token].exp2(), scores.exp().sum(1))
            token += 1
    unused = KV(torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan))
    if not any(before):
        # Nothing is gathered: it is not a number.
        torch.testing.assert_close(attention.run(query, projected, unused, rows, layer)[0], out)
