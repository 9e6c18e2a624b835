"""FlashInfer's wrappers as loops that read the same buffers, for interpreted_dynamic_backend.py."""

from __future__ import annotations

import itertools
import random
from functools import partial
from typing import Any

import pytest
import torch
from flashinfer.page import get_seq_lens

from lt_sglang.attention.decode_plan import DecodePlan

HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 8, 16


LOG2E = 1.4426950408889634


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's: queries are the last positions; LSE to base 2."""
    count, length = len(query), len(keys)
    group = query.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->qhk", query, keys.repeat_interleave(group, 1)) * DIM**-0.5
    at = torch.arange(length - count, length)[:, None, None]
    key = torch.arange(length)[None, None, :]
    if causal:
        scores = scores.masked_fill(key > at, -torch.inf)
    if window >= 0:
        scores = scores.masked_fill(key < at - window, -torch.inf)
    out = torch.einsum("qhk,khd->qhd", scores.softmax(-1), values.repeat_interleave(group, 1))
    return out, torch.logsumexp(scores, -1) * LOG2E


class Paged:
    """BatchPrefillWithPagedKVCacheWrapper: planned on the host, lists read from its buffers at run time."""

    def begin_forward(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        rows: Any,
        last_page_len: Any,
        *_: Any,
        causal: bool = False,
        **options: Any,
    ) -> None:
        self.qo, self.planned = qo_indptr.tolist(), get_seq_lens(kv_indptr, last_page_len, 1).tolist()
        self.causal, self.window = causal, options.get("window_left", -1)

    def forward_return_lse(self, query: torch.Tensor, cache: Any, **options: Any) -> Any:
        assert options["causal"] == self.causal and options.get("window_left", -1) == self.window
        pointers = self._paged_kv_indptr_buf.tolist()
        out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:2], torch.nan)
        for index, planned in enumerate(self.planned):
            one = slice(self.qo[index], self.qo[index + 1])
            rows = self._paged_kv_indices_buf[pointers[index] : pointers[index + 1]].long()
            assert len(rows) in (0, planned), "lists are as planned or empty"
            if len(rows):
                keys, values = cache[0][rows, 0], cache[1][rows, 0]
                out[one], lse[one] = attention(query[one], keys, values, self.causal, self.window)
            elif planned == 0:
                out[one], lse[one] = 0, -torch.inf
        return out, lse


class Planned:
    """A plan as PrefillSM90Plan writes it: an entry for each tile of queries and each head, in any order."""

    tile = 4

    def __init__(self) -> None:
        self._int_workspace_buffer = torch.randint(0, 255, (1 << 14,), dtype=torch.uint8)
        self._plan_info: list[int] = []

    def write(self, qo: list[int], lengths: list[int]) -> None:
        works = [
            (tile, qo[request], qo[request + 1] - qo[request], length, head, request)
            for request, length in enumerate(lengths)
            for tile in range(-(-(qo[request + 1] - qo[request]) // self.tile))
            for head in range(HEADS)
        ]
        random.Random(len(works)).shuffle(works)
        self.works = len(works)
        tiles, starts, queries, kv, heads, requests = (list(column) for column in zip(*works, strict=True))
        columns = (tiles, starts, [0] * len(works), queries, kv, heads, [0] * 17, requests)
        self._plan_info, at = [], 0
        for column in columns:
            raw = torch.tensor(column, dtype=torch.int32).view(torch.uint8)
            self._int_workspace_buffer[at : at + len(raw)] = raw
            self._plan_info.append(at)
            at += -(-len(raw) // 16) * 16
        self._plan_info.append(0)

    def lengths(self, requests: int) -> list[int]:
        """What the kernel would take each request's list to be long; every tile and head must agree."""

        def column(field: int) -> list[int]:
            first = self._plan_info[field]
            values = self._int_workspace_buffer[first : first + 4 * self.works].view(torch.int32)
            return list(values.tolist())

        found: dict[int, set[int]] = {}
        for request, length in zip(column(7), column(4), strict=True):
            found.setdefault(request, set()).add(length)
        return [min(found[request]) if len(found[request]) == 1 else -1 for request in range(requests)]


class PlannedPaged(Planned):
    """BatchPrefillWithPagedKVCacheWrapper on FA3: lists begin where they were planned, and are as long."""

    def begin_forward(
        self, qo_indptr: Any, kv_indptr: Any, rows: Any, last_page_len: Any, *_: Any, **__: Any
    ) -> None:
        self.qo, self.kv, self.window = qo_indptr.tolist(), kv_indptr.tolist(), -1
        self.write(self.qo, get_seq_lens(kv_indptr, last_page_len, 1).tolist())

    def forward_return_lse(self, query: torch.Tensor, cache: Any, **options: Any) -> Any:
        keys, values = (part[self._paged_kv_indices_buf.long(), 0] for part in cache)
        return self.attend(query, keys, values, **options)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: Any) -> Any:
        out, lse = torch.zeros_like(query), torch.full(query.shape[:2], -torch.inf)
        self.ran = self.lengths(len(self.qo) - 1)
        for index, length in enumerate(self.ran):
            one = slice(self.qo[index], self.qo[index + 1])
            own = slice(self.kv[index], self.kv[index] + length)
            assert length in (0, self.kv[index + 1] - self.kv[index])
            if length:
                window = options.get("window_left", -1)
                assert window == self.window
                out[one], lse[one] = attention(query[one], keys[own], values[own], options["causal"], window)
        return out, lse


class Ragged(PlannedPaged):
    """BatchPrefillWithRaggedKVCacheWrapper on FA3: over new tokens, or over gathered ones."""

    def begin_forward(self, qo_indptr: Any, kv_indptr: Any, *_: Any, **options: Any) -> None:
        self.qo, self.kv, self.window = qo_indptr.tolist(), kv_indptr.tolist(), options["window_left"]
        self.write(self.qo, kv_indptr.diff().tolist())

    def forward_return_lse(
        self, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> Any:
        assert len(k) == len(v) == self.kv[-1]
        return self.attend(query, k, v, **options)

    def forward(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.forward_return_lse(*args, **options)[0]


class Decode:
    """BatchDecodeWithPagedKVCacheWrapper with tensor cores: lists may be shorter than planned."""

    is_cuda_graph_enabled = False
    _int_workspace_buffer = None

    def begin_forward(self, indptr: torch.Tensor, *_: Any, **__: Any) -> None:
        self.planned = indptr.diff().tolist()

    def forward(self, query: torch.Tensor, cache: Any, **_: Any) -> torch.Tensor:
        pointers = self._paged_kv_indptr_buf.tolist()
        out = torch.empty_like(query)
        for index, planned in enumerate(self.planned):
            rows = self._paged_kv_indices_buf[pointers[index] : pointers[index + 1]].long()
            assert 0 < len(rows) <= planned
            one = slice(index, index + 1)
            out[one], _ = attention(query[one], cache[0][rows, 0], cache[1][rows, 0], False, -1)
        return out


class GraphDecode:
    """The same under CUDA graphs, replayed: it runs the plan that lies in its integer workspace.

    No list here is longer than the smallest chunk; the tests of decode_plans have longer ones.
    """

    is_cuda_graph_enabled = True

    def __init__(self, requests: int) -> None:
        self.begin_forward = partial(pytest.fail, "the host planned a replay")
        self._own = self._int_workspace_buffer = torch.full((4096,), 255, dtype=torch.uint8)
        self._plan_info = DecodePlan(requests, 40, tile=16, places=33, partial_bytes=0, uneven_chunks=40).info

    def forward(self, query: torch.Tensor, cache: Any, **_: Any) -> torch.Tensor:
        assert self._int_workspace_buffer is not self._own
        plan = self._int_workspace_buffer

        def read(field: int, count: int) -> list[int]:
            first = self._plan_info[field]
            return plan[first : first + 4 * count].view(torch.int32).tolist()

        (requests,), (size,) = read(2, 1), read(9, 1)
        pointers = self._paged_kv_indptr_buf.tolist()
        first = self._plan_info[12]
        chunks = sum(plan[first : first + self._plan_info[0]].tolist())
        parts: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for request, tile in zip(read(4, chunks), read(6, chunks), strict=True):
            rows = self._paged_kv_indices_buf[pointers[request] : pointers[request + 1]].long()
            rows = rows[tile * size : (tile + 1) * size]
            one = query[request : request + 1]
            part = attention(one, cache[0][rows, 0], cache[1][rows, 0], False, -1)
            parts.setdefault(request, []).append(part)
        ends = read(8, requests + 1)
        assert read(7, requests + 1) == ends
        assert [b - a for a, b in itertools.pairwise(ends)] == [len(parts[i]) for i in range(requests)]
        return torch.cat([merge_all(parts[request]) for request in range(requests)])


def merge_all(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One output of those of the chunks."""
    out, lse = parts[0]
    for other, other_lse in parts[1:]:
        out, lse = merge(out, lse, other, other_lse)
    return out


def merge(o1: torch.Tensor, s1: torch.Tensor, o2: torch.Tensor, s2: torch.Tensor) -> Any:
    """flashinfer.merge_state."""
    weights = torch.softmax(torch.stack([s1, s2]) / LOG2E, 0)[..., None]
    return weights[0] * o1 + weights[1] * o2, torch.logsumexp(torch.stack([s1, s2]) / LOG2E, 0) * LOG2E
