"""fp8 KV with a checkpoint's scales: attention and scores read K and V, not what is left of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from lt_sglang.attention.static_flashinfer import LightTransferFlashInferBackend
from lt_sglang.config import LightTransferConfig
from lt_sglang.identify.selector import _Gathered
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.banks import BankLayout
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


@pytest.mark.parametrize("layer_id", [0, 2], ids=["full bank", "streaming bank"])
def test_scores_read_staged_keys_with_their_scale(layer_id: int) -> None:
    layout = BankLayout(UnitShape(2, 2), 400)
    rows = (layout.total_rows, 1, DIM)
    pool = KV(*(torch.zeros(rows, dtype=torch.uint8) for _ in range(2)))
    config = LightTransferConfig((1,), mode="dynamic", sink_tokens=4, recent_tokens=60)
    prefix, extend = 100, 20
    true = torch.randn(prefix + extend, 1, DIM)
    full = torch.arange(1, prefix + extend + 1)
    streaming = full + 200
    stored = (true / SCALE).to(FP8).view(torch.uint8)
    for part in pool:
        part[layout.bank_start(0) + full] = stored
        part[layout.bank_start(2) + streaming] = stored
    units = SimpleNamespace(rest=torch.zeros(0, 400, dtype=torch.int32))
    flat = SimpleNamespace(kv=pool, units=units)
    state: Any = SimpleNamespace(config=config, layout=layout, pool=flat, kv_dtype=FP8)
    plan = Prefill(Kind.SELECT, 1, 1, prefix, extend, extend)
    gathered = _Gathered(state, plan, 0, (full.int(), streaming.int()), "cpu")
    layer: Any = SimpleNamespace(layer_id=layer_id, k_scale_float=SCALE, v_scale_float=SCALE)
    new = true[prefix:].bfloat16()
    wanted = true[gathered.positions.long()]
    for found in gathered.selected(layer, KV(new, new)):
        torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.01)
