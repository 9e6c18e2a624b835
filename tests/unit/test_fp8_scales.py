"""fp8 KV with a checkpoint's scales: attention and scores read K and V, not what is left of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from lt_sglang.attention.static_flashinfer import LightTransferFlashInferBackend
from lt_sglang.config import LightTransferConfig
from lt_sglang.identify.observation_window import LastQueries, ObservationWindow
from lt_sglang.identify.selector import _Alone
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.banks import BankLayout
from lt_sglang.memory.flat_pool import FlatPool
from lt_sglang.memory.kv import KV
from lt_sglang.memory.units import UnitShape

SCALE, FP8 = 0.05, torch.float8_e4m3fn
HEADS, KV_HEADS, DIM = 4, 2, 16


class Pool(MHATokenToKVPool):
    """SGLang's own set_kv_buffer over buffers without a GPU."""

    is_quantized_kv_cache = False

    def __init__(self) -> None:
        self.dtype, self.store_dtype = FP8, torch.uint8
        self.start_layer, self.use_hnd, self.size, self.page_size = 0, False, 64, 1
        self.written: dict[str, torch.Tensor] = {}

    def _check_physical_write_loc(self, *_: Any) -> None: ...

    def _store_kv_layer(self, _layer: int, _where: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.written = {"k": k, "v": v}

    def get_kv_buffer(self, _layer: int) -> tuple[None, None]:
        return None, None


def test_a_full_layer_prefills_on_what_was_projected() -> None:
    """SGLang's pool divides K and V by their scales in place."""
    seen: list[torch.Tensor] = []

    def forward(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.extend((k.clone(), v.clone()))
        return torch.zeros_like(query)

    backend: Any = object.__new__(LightTransferFlashInferBackend)
    backend.lazy_layers, backend.token_to_kv_pool = frozenset({1}), Pool()
    backend.prefill_wrapper_ragged = SimpleNamespace(forward=forward)
    backend.kv_cache_quant_method = SimpleNamespace(needs_global_scale=lambda: False)
    backend.forward_metadata = SimpleNamespace(use_ragged=True, swa_out_cache_loc=None)
    backend.prefill = SimpleNamespace(whole=None, prefix=None)
    backend.parts = SimpleNamespace(of=lambda layer: 0)
    scale = torch.tensor(SCALE)
    layer = SimpleNamespace(
        layer_id=0,
        head_dim=DIM,
        scaling=0.25,
        logit_cap=0.0,
        is_cross_attention=False,
        tp_q_head_num=HEADS,
        tp_k_head_num=KV_HEADS,
        tp_v_head_num=KV_HEADS,
        k_scale=scale,
        v_scale=scale,
        k_scale_float=SCALE,
        v_scale_float=SCALE,
    )
    batch = SimpleNamespace(out_cache_loc=torch.arange(1, 9), out_cache_loc_is_physical=False)
    query = torch.randn(8, HEADS * DIM).bfloat16()
    k, v = torch.randn(2, 8, KV_HEADS, DIM).bfloat16()
    projected = k.clone(), v.clone()
    backend.forward_extend(query, k, v, layer, batch, True)
    assert torch.equal(seen[0], projected[0]) and torch.equal(seen[1], projected[1])
    stored = backend.token_to_kv_pool.written["k"].view(FP8).float() * SCALE
    torch.testing.assert_close(stored, projected[0].float(), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("kv_dtype", [FP8, torch.bfloat16], ids=["fp8", "bfloat16"])
@pytest.mark.parametrize("layer_id", [0, 1, 2, 5], ids=["full", "full, last", "streaming", "second unit"])
def test_scores_read_stored_keys_with_their_scale(layer_id: int, kv_dtype: torch.dtype) -> None:
    """Of a prompt of several chunks: at the rows of its bank, each unit with rows of its own."""
    shape = UnitShape(2, 4)
    layout = BankLayout(shape, 400)
    prefix, extend = 100, 20
    end = prefix + extend
    true = torch.randn(end, KV_HEADS, DIM)
    full, streaming = torch.randperm(190)[:end] + 1, torch.randperm(190)[:end] + 200
    rest = torch.randint(0, 400, (shape.parts - 1, 400), dtype=torch.int32)
    rest[0, streaming] = (torch.randperm(190)[:end] + 200).int()
    pool = KV(*(torch.zeros(layout.total_rows, KV_HEADS, DIM).to(kv_dtype) for _ in range(2)))
    scale = SCALE if kv_dtype == FP8 else 1.0
    rows = layout.bank_rows(layer_id, full if layer_id < 2 else streaming, rest)
    for sign, part in zip((1, -1), pool, strict=True):
        part[rows] = (sign * true / scale).to(kv_dtype)
    flat = FlatPool(layout, SimpleNamespace(rest=rest))  # type: ignore[arg-type]
    flat._buffers = KV(*(part.view(torch.uint8) if kv_dtype == FP8 else part for part in pool))
    ranks = SimpleNamespace(heads=HEADS, total_heads=HEADS, reduce=None, reduce_max=None)
    state: Any = SimpleNamespace(
        config=LightTransferConfig((1,), mode="dynamic", sink_tokens=4, recent_tokens=60),
        layout=layout,
        pool=flat,
        kv_dtype=kv_dtype,
        observed=ObservationWindow(8),
        ranks=ranks,
        projections={},
    )
    plan = Prefill(Kind.SELECT, 1, 1, prefix, extend, 8)
    alone = _Alone(state, plan, 3, (full.int(), streaming.int()), "cpu")
    layer: Any = SimpleNamespace(layer_id=layer_id, k_scale_float=scale, v_scale_float=scale, scaling=1.0)
    queries = torch.randn(3 + extend, HEADS, DIM).bfloat16()
    batch = LastQueries(queries, queries, torch.zeros(3 + extend, HEADS), None)
    new = torch.zeros(3 + extend, KV_HEADS, DIM).bfloat16()  # what is stored counts
    found = alone.evidence(layer, batch, KV(new, new))
    wanted = [*range(4), *range(end - 60, end)]
    assert found.key_positions.tolist() == [wanted] and found.query_positions.tolist() == [[*range(112, end)]]
    assert torch.equal(found.query[found.query_rows[0].long()], queries[15:])
    for sign, keys in ((1, found.keys), (-1, found.values)):
        read = keys[found.key_rows[0].long()].float()
        torch.testing.assert_close(read, sign * true[wanted], rtol=0.1, atol=0.02)
