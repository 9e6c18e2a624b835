"""Both backends of dynamic mode over one memory, batch by batch, for interpreted_dynamic_backend.py."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
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
from lt_sglang.memory.flat_pool import FlatPool
from lt_sglang.memory.units import UnitList, UnitShape

# SGLang defines its FlashInfer backend only where it sees a GPU.
for module in (sglang.srt.utils, sglang.srt.utils.common):
    module.is_flashinfer_available = lambda: True


from lt_sglang.attention import dynamic_flashinfer, gathered, prefix  # noqa: E402
from lt_sglang.attention.decode_plan import GraphPlans  # noqa: E402
from lt_sglang.attention.dynamic_decode import DynamicDecodeUpdater, GraphBuffers  # noqa: E402
from lt_sglang.attention.dynamic_prefill import GatheredCall, PrefillCalls  # noqa: E402
from lt_sglang.attention.dynamic_torch import DynamicTorchBackend  # noqa: E402
from lt_sglang.attention.prefix import PrefixAttention  # noqa: E402

from .interpreted_dynamic_wrappers import (  # noqa: E402
    DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    Decode,
    GraphDecode,
    Paged,
    PlannedPaged,
    Ragged,
    merge,
)

LAYERS, KEEP = 5, 2
SINK, RECENT = 4, 12
UNITS, SETS = 2400, 6
# Two backends may differ by so much in an output or a score; so two layers' scores must lie well apart for
# both to choose the same.
NOISE = 2e-5
CLEAR = 10 * NOISE
WINDOWS = Windows(SINK, RECENT)
SHAPE = UnitShape(KEEP, LAYERS - KEEP)  # tokens of two and of three units
LAYOUT = BankLayout(SHAPE, UNITS + 1)


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

    def prefill(
        self,
        work: list[tuple[Kind, Request, int, int]],
        remembered: dict[int, tuple[float, ...]] | None = None,
    ) -> Any:
        """Prefill (kind, request, new tokens, scored queries) in one batch, in both backends; compare.

        remembered: by layer set, the scores of requests that were retracted.
        """
        self.plans = []
        remembered = remembered or {}
        for kind, request, extend, queries in work:
            prefix, had = request.tokens, remembered.get(request.layer_set)
            self.grow(request, extend)
            self.plans.append(Prefill(kind, request.row, request.layer_set, prefix, extend, queries, had))
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
