"""The GPU backend of dynamic mode against the CPU one, batch by batch; test_kernels.py runs this.

Triton kernels run under the interpreter, FlashInfer's wrappers are replaced by loops that read the same
buffers, and both backends get the same queries, keys and values, slots and plans. What must agree: outputs,
every row of memory that is ever read, layer tables and scores.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.utils
import sglang.srt.utils.common
import torch

from lt_sglang.attention.indices import StreamingTables, Windows
from lt_sglang.config import LightTransferConfig
from lt_sglang.identify.scores.factory import get_score
from lt_sglang.identify.state import DynamicState, Ranks
from lt_sglang.layers.layer_sets import LayerSetStore
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.banks import BankLayout
from lt_sglang.memory.units import UnitList, UnitShape
from lt_sglang.memory.flat_pool import FlatPool

# SGLang defines its FlashInfer backend only where it sees a GPU.
for module in (sglang.srt.utils, sglang.srt.utils.common):
    module.is_flashinfer_available = lambda: True

from flashinfer.page import get_seq_lens  # noqa: E402

from lt_sglang.attention import dynamic_flashinfer, gathered, prefix  # noqa: E402
from lt_sglang.attention.decode_plan import DecodePlan, GraphPlans  # noqa: E402
from lt_sglang.attention.dynamic_decode import DynamicDecodeUpdater, GraphBuffers  # noqa: E402
from lt_sglang.attention.dynamic_prefill import GatheredCall, PrefillCalls  # noqa: E402
from lt_sglang.attention.dynamic_torch import DynamicTorchBackend  # noqa: E402
from lt_sglang.attention.prefix import PrefixAttention  # noqa: E402

LAYERS, KEEP = 5, 2
SINK, RECENT = 4, 12
UNITS, SETS = 2400, 6
HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 8, 16
LOG2E = 1.4426950408889634
# Two backends may differ by so much in an output or a score; so two layers' scores must lie well apart for
# both to choose the same.
NOISE = 2e-5
CLEAR = 10 * NOISE
WINDOWS = Windows(SINK, RECENT)
SHAPE = UnitShape(KEEP, LAYERS - KEEP)  # tokens of two and of three units
LAYOUT = BankLayout(SHAPE, UNITS + 1)


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
        self._plan_info = DecodePlan(requests, 40, tile=16, places=33, partial_bytes=0).info

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


@dataclass
class Request:
    """A request of the script: its row, layer set and how many tokens it has."""

    row: int
    layer_set: int
    tokens: int = 0


class World:
    """Slots and tables that both backends share, and one of each backend."""

    def __init__(self, seed: int, score: str, monkeypatch: pytest.MonkeyPatch, draw: int = 0) -> None:
        monkeypatch.setattr(dynamic_flashinfer.stock, "_safe_merge_state", merge)
        # Every way of attending over a prefix.
        self.kernels = "fa3" if seed % 2 else "fa2"
        monkeypatch.setattr(
            prefix.flashinfer_prefill, "determine_attention_backend", lambda *_, **__: self.kernels
        )
        row_bytes = 2 * KV_HEADS * DIM * 2
        monkeypatch.setattr(gathered, "GATHER_BYTES", {5: 0, 7: 90}.get(seed, 65536) * row_bytes)
        torch.manual_seed(100 * draw + seed)
        rng = random.Random(seed)
        self.units = UnitList(UNITS, 1, SHAPE.parts, "cpu")
        self.units.free = torch.tensor(rng.sample(range(1, UNITS + 1), UNITS))
        self.tables = StreamingTables(
            torch.zeros((16, 128), dtype=torch.int32),
            torch.zeros(UNITS + 2, dtype=torch.int64),
            torch.full((16,), -1, dtype=torch.int32),
            self.units.take(SETS * SINK, SHAPE.streaming_units).view(SETS, SINK).int(),
        )
        self.projections = [torch.randn(HIDDEN, HEADS * DIM) / 8 for _ in range(LAYERS)]
        self.plans: list[Prefill] = []
        self.torch_state, self.cuda_state = self._state(score), self._state(score)
        self.torch_backend = DynamicTorchBackend(self._runner(self.torch_state))
        self.cuda_backend = self._cuda_backend()
        self.popped: list[int] = []

    def _state(self, score: str) -> DynamicState:
        config = LightTransferConfig(
            (0, 1, 2), mode="dynamic", keep=KEEP, score=score, sink_tokens=SINK, recent_tokens=RECENT
        )
        pool = FlatPool(LAYOUT, self.units)
        for banks in (KEEP, LAYERS - KEEP):
            pool.take(banks, (KV_HEADS, DIM), torch.float32, "cpu")
        sets = LayerSetStore(12, config.lazy_layers, LAYERS, 16, "cpu")

        def same(tensor: torch.Tensor) -> torch.Tensor:
            return tensor

        ranks = Ranks(HEADS, HEADS, same, same, same)
        weights = self.projections
        projections = {layer: (lambda rows, layer=layer: rows @ weights[layer].T) for layer in range(LAYERS)}
        scored = None if score == "list" else get_score(score)
        return DynamicState(config, pool, torch.float32, sets, scored, ranks, projections)

    def _runner(self, state: DynamicState) -> Any:
        return SimpleNamespace(
            device="cpu",
            dynamic=state,
            req_to_token_pool=None,
            token_to_kv_pool=None,
            kv_index_translator=None,
            windows=lambda: WINDOWS,
            streaming_tables=lambda: self.tables,
            prefill_plans=SimpleNamespace(of=lambda _: self.plans),
        )

    def _cuda_backend(self) -> Any:
        state = self.cuda_state
        backend: Any = object.__new__(dynamic_flashinfer.DynamicFlashInferBackend)
        backend.workspace_buffer = torch.empty(1)
        over_prefix: Any = object.__new__(PrefixAttention)
        over_prefix._paged, over_prefix._dense = PlannedPaged(), Ragged()
        over_prefix._device = torch.device("cpu")
        backend.calls = PrefillCalls(
            updater=SimpleNamespace(
                num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, q_data_type=None, data_type=None
            ),
            ragged=Ragged(),
            paged=[Paged(), Paged()],
            prefix=over_prefix,
            whole=self._gathering(-1),
            window=self._gathering(RECENT - 1),
        )
        backend._set_up(self._runner(state))
        plans: Any = object.__new__(GraphPlans)
        plans.buffer = torch.randint(0, 255, (LAYERS, 8192), dtype=torch.uint8)
        plans._heads, plans._kv_heads, plans._dim, plans._processors = HEADS, KV_HEADS, DIM, 16
        plans._workspace_bytes, plans._plans = 1 << 20, {}
        backend.steps.graphs = GraphBuffers(
            kv_indices=torch.zeros(8192, dtype=torch.int32),
            kv_indptr=torch.zeros(LAYERS * 16 + 1, dtype=torch.int32),
            out_cache_loc=torch.zeros((LAYERS, 16), dtype=torch.int32),
            plans=plans,
            padding=0,
        )
        updater: Any = object.__new__(DynamicDecodeUpdater)
        updater.runner, updater.banks, updater.steps = backend.runner, backend.banks, backend.steps
        updater.num_qo_heads, updater.num_kv_heads, updater.head_dim = HEADS, KV_HEADS, DIM
        updater.data_type = updater.q_data_type = None
        updater.kv_last_page_len = torch.ones(16, dtype=torch.int32)
        backend.indices_updater_decode = updater
        return backend

    @staticmethod
    def _gathering(window_left: int) -> Any:
        gathering: Any = object.__new__(gathered.GatheredAttention)
        gathering.wrapper, gathering._window_left = Ragged(), window_left
        return gathering

    def grow(self, request: Request, tokens: int) -> None:
        """Give a request slots for ``tokens`` more positions."""
        for position in range(request.tokens, request.tokens + tokens):
            slot = self.units.take(1, SHAPE.full_units)
            self.tables.req_to_token[request.row, position] = slot.int()
            self.tables.full_to_streaming[slot] = self.units.take(1, SHAPE.streaming_units)
        request.tokens += tokens
        for state in (self.torch_state, self.cuda_state):
            state.sets.set_of[request.row] = request.layer_set

    def share(self, request: Request, other: Request, tokens: int) -> None:
        """Let a request begin with another's cached prefix, and use its layer set."""
        self.tables.req_to_token[request.row, :tokens] = self.tables.req_to_token[other.row, :tokens]
        self.tables.sink_set_of[request.row] = self.tables.sink_set_of[other.row]
        request.tokens, request.layer_set = tokens, other.layer_set

    def slide(self, request: Request, sink_set: int) -> None:
        """Let the window leave the first positions; keep the sinks in ``sink_set``."""
        slots = self.tables.req_to_token[request.row, : request.tokens].long()
        streaming, parts = self.tables.full_to_streaming[slots], SHAPE.streaming_units
        target = self.units.rows_in_parts(self.tables.sink_slots_of[sink_set].long(), parts)
        source = self.units.rows_in_parts(streaming[:SINK], parts)
        for state in (self.torch_state, self.cuda_state):
            state.pool.copy_rows(target.flatten(), source.flatten())
        self.tables.sink_set_of[request.row] = sink_set
        self.tables.full_to_streaming[slots[: request.tokens - RECENT]] = 0

    def prefill(self, work: list[tuple[Kind, Request, int, int]]) -> Any:
        """Prefill (kind, request, new tokens, scored queries) in one batch, in both backends; compare."""
        self.plans = []
        for kind, request, extend, queries in work:
            prefix = request.tokens
            self.grow(request, extend)
            self.plans.append(Prefill(kind, request.row, request.layer_set, prefix, extend, queries))
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(
                is_idle=lambda: False, is_decode=lambda: False, is_decode_or_idle=lambda: False
            ),
            req_pool_indices=torch.tensor([request.row for _, request, _, _ in work]),
            seq_lens=torch.tensor([request.tokens for _, request, _, _ in work]),
            residual_stream=SimpleNamespace(residual=None),
        )
        watches = [state.stopwatch for state in (self.torch_state, self.cuda_state)]
        before = [watch.read() for watch in watches]
        self.torch_backend.init_forward_metadata(batch)
        self.cuda_backend.init_forward_metadata(batch)
        for layer in range(LAYERS):
            self._layer(batch, layer, sum(extend for _, _, extend, _ in work), "forward_extend")
        scored = (Kind.SELECT,) if self.torch_state.score is None else (Kind.SELECT, Kind.STAGED)
        finding = any(kind in scored for kind, *_ in work)
        for watch, seconds in zip(watches, before, strict=True):
            assert (watch.read() > seconds) == finding, "only finding layers takes time"
        self._assert_clear([request.layer_set for kind, request, *_ in work if kind is Kind.SELECT])
        return self.cuda_backend.prefill

    def _assert_clear(self, decided: list[int]) -> None:
        """Rounding decides nothing here: any two layers' scores of a request lie far apart."""
        if self.torch_state.score is None:
            return
        for scores in self.torch_state.sets.laziness[decided].tolist():
            gap = min(b - a for a, b in itertools.pairwise(sorted(scores)))
            assert gap > CLEAR, f"{scores}: too close to tell; take another draw"

    def decode(self, requests: list[Request], graph: bool = False) -> None:
        """One token for every request."""
        for request in requests:
            self.grow(request, 1)
        rows = torch.tensor([request.row for request in requests])
        lengths = torch.tensor([request.tokens for request in requests])
        slots = self.tables.req_to_token[rows, lengths - 1].long()
        mode = SimpleNamespace(is_idle=lambda: False, is_decode=lambda: True)
        batch = SimpleNamespace(
            forward_mode=mode, req_pool_indices=rows, seq_lens=lengths, out_cache_loc=slots
        )
        self.torch_backend.init_forward_metadata(batch)
        backend, wrapper = self.cuda_backend, GraphDecode(len(requests)) if graph else Decode()
        backend.indices_updater_decode.update_sliding_window(
            lengths, lengths, 0, [wrapper], None, None, plan=None, req_pool_indices=rows
        )
        backend.forward_metadata = dynamic_flashinfer.DecodeMetadata([wrapper])
        backend._find_out_cache_loc(batch, self.tables.full_to_streaming[slots])
        for layer in range(LAYERS):
            self._layer(batch, layer, len(requests), "forward_decode")

    def _layer(self, batch: Any, number: int, tokens: int, function: str) -> None:
        layer = SimpleNamespace(
            layer_id=number,
            tp_q_head_num=HEADS,
            tp_k_head_num=KV_HEADS,
            tp_v_head_num=KV_HEADS,
            head_dim=DIM,
            qk_head_dim=DIM,
            v_head_dim=DIM,
            scaling=DIM**-0.5,
            logit_cap=0.0,
            k_scale_float=None,
            v_scale_float=None,
        )
        # As the projection leaves them: side by side in every row.
        q, k, v = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * DIM).split(
            [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=1
        )
        k, v = k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM)
        if function == "forward_extend":
            batch.residual_stream.residual = torch.randn(tokens, HIDDEN)
        expected = getattr(self.torch_backend, function)(q, k, v, layer, batch)
        found = getattr(self.cuda_backend, function)(q, k, v, layer, batch)
        torch.testing.assert_close(found, expected, atol=NOISE, rtol=NOISE)
        ours, theirs = self.cuda_state, self.torch_state
        assert torch.equal(ours.sets.bank_of, theirs.sets.bank_of), number
        torch.testing.assert_close(ours.sets.laziness, theirs.sets.laziness, atol=NOISE, rtol=NOISE)
        if function == "forward_extend" and self.kernels == "fa3":
            self._no_work_where_lazy(number)
        for name in ("k", "v"):
            a, b = getattr(ours.pool.kv, name), getattr(theirs.pool.kv, name)
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=f"{name} after layer {number}")

    def _no_work_where_lazy(self, layer: int) -> None:
        """Outputs would be right without it: what is lazy is written over."""
        backend, banks = self.cuda_backend, self.cuda_state.sets.bank_of
        lazy = [
            backend.prefill.windowed and one.kind == Kind.KNOWN and int(banks[one.layer_set, layer]) >= KEEP
            for one in self.plans
        ]
        calls = backend.prefill
        if isinstance(calls.lazy, GatheredCall):
            spans = [one.end - max(one.prefix - RECENT + 1, 0) for one in self.plans]
            ran = [span if skip else 0 for skip, span in zip(lazy, spans, strict=True)]
            assert calls.lazy.attention.wrapper.ran == ran
        if calls.full is not None:
            ran = [0 if skip else one.end for skip, one in zip(lazy, self.plans, strict=True)]
            assert calls.full.attention.wrapper.ran == ran
            return
        new = [0 if skip else one.extend for skip, one in zip(lazy, self.plans, strict=True)]
        cached = [0 if skip else one.prefix for skip, one in zip(lazy, self.plans, strict=True)]
        assert backend.calls.ragged.ran == new
        assert calls.prefix_kv_indices is None or backend.calls.prefix.wrapper.ran == cached


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
