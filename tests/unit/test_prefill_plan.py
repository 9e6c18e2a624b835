"""What static mode plans for a prefill on a GPU: every list, against the positions it stands for."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lt_sglang.attention.flashinfer_backend import FULL, LAZY, LazyPrefillUpdater
from tests.unit.streaming import Batch

SINK, RECENT = 4, 8
# Tokens before the chunk, and with it: none, less than a window, more, and a chunk of one token.
PREFIXES, LENGTHS = [0, 5, 40, 30], [20, 12, 60, 31]


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

    def plan(self, updater: Any, extends: list[int], prefixes: list[int]) -> None:
        self.planned = extends, prefixes


def plan(prefixes: list[int], use_ragged: bool) -> tuple[Batch, Recorder, list[Recorder], Any]:
    batch = Batch(random.Random(2), SINK, RECENT, LENGTHS, captured=False)
    ragged, paged = Recorder(), [Recorder(), Recorder()]
    updater: Any = object.__new__(LazyPrefillUpdater)
    updater.runner = SimpleNamespace(windows=lambda: batch.windows, streaming_tables=lambda: batch.tables)
    updater.attn_backend = SimpleNamespace(
        lazy_prefill=None, prefix=Prefix(), prefix_rows="of the batch before"
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


def full_slots(batch: Batch, index: int, end: int) -> list[int]:
    return batch.tables.req_to_token[batch.rows[index], :end].tolist()


def test_full_layers_read_the_cached_prefix_and_new_tokens_ragged() -> None:
    batch, ragged, paged, backend = plan(PREFIXES, use_ragged=True)
    extends = [length - prefix for length, prefix in zip(LENGTHS, PREFIXES, strict=True)]
    assert ragged.given[0].diff().tolist() == ragged.given[1].diff().tolist() == extends
    assert ragged.options["causal"] is True
    assert backend.prefix.planned == (extends, PREFIXES)
    expected = [slot for i, end in enumerate(PREFIXES) for slot in full_slots(batch, i, end)]
    assert backend.prefix_rows.tolist() == expected
    assert not hasattr(paged[FULL], "given")


def test_without_ragged_full_layers_read_everything_causally() -> None:
    batch, ragged, paged, backend = plan(PREFIXES, use_ragged=False)
    assert not hasattr(ragged, "given") and backend.prefix_rows is None
    assert paged[FULL].spans() == [full_slots(batch, i, end) for i, end in enumerate(LENGTHS)]
    assert paged[FULL].options["causal"] is True and paged[FULL].options["window_left"] == -1


def test_nothing_cached_is_nothing_paged() -> None:
    _, ragged, paged, backend = plan([0, 0, 0, 0], use_ragged=True)
    assert ragged.given[0].diff().tolist() == LENGTHS
    assert not hasattr(paged[FULL], "given")
    assert backend.prefix.planned is None and backend.prefix_rows is None


@pytest.mark.parametrize("use_ragged", [True, False])
def test_lazy_layers_read_the_window_before_the_chunk_and_the_chunk(use_ragged: bool) -> None:
    batch, _, paged, backend = plan(PREFIXES, use_ragged)
    firsts = [max(prefix - (RECENT - 1), 0) for prefix in PREFIXES]
    assert paged[LAZY].spans() == [
        [batch.slot_of_position(i, j) for j in range(first, end)]
        for i, (first, end) in enumerate(zip(firsts, LENGTHS, strict=True))
    ]
    assert paged[LAZY].options["causal"] is True and paged[LAZY].options["window_left"] == RECENT - 1
    assert backend.lazy_prefill.rows.shape == (len(LENGTHS), SINK)
