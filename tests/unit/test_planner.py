"""lt_sglang.planner: known facts of the roofline, counted weights, and plans by the server's arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.demand import Demand
from lt_sglang.memory.units import UnitShape
from lt_sglang.planner.capacity import Deployment, better_split, plan_length, plan_mix, sizes_of
from lt_sglang.planner.mix import Part, requests_at_once, running
from lt_sglang.planner.report import as_dict, as_text
from lt_sglang.planner.roofline import Efficiency, Hardware, LazyShare, decode_bound, kv_bytes, throughput
from lt_sglang.planner.shapes import GIB, GPUS, SHAPES, Gpu, ModelShape

MISTRAL = SHAPES["mistral-7b"]
LLAMA = SHAPES["llama-3-70b"]
A100 = GPUS["a100-80"]
HALF = LightTransferConfig(tuple(range(1, 32, 2)))
NONE = LazyShare(0, 0)


def deployment(**changes: Any) -> Deployment:
    values: dict[str, Any] = {
        "shape": MISTRAL,
        "hardware": Hardware(A100),
        "config": HALF,
        "mem_fraction": 0.88,
        "weights_bytes": MISTRAL.total_weight_bytes,
    }
    return Deployment(**{**values, **changes})


@pytest.mark.parametrize(
    ("tokens", "share", "ratio"),
    [(4096, 0.5, 1.60), (8192, 0.5, 1.78), (16384, 0.5, 1.88), (32768, 0.5, 1.94), (16384, 0.75, 3.4)],
)
def test_bound(tokens: int, share: float, ratio: float) -> None:
    assert decode_bound(tokens, share, 1024) == pytest.approx(ratio, abs=0.05 if ratio == 3.4 else 0.005)


@pytest.mark.parametrize("tp", [1, 8])
def test_seconds_by_hand(tp: int) -> None:
    """Two requests of 1,000 tokens in and 100 out; 4 layers, 2 of them lazy with 100 tokens."""
    toy = ModelShape("toy", 4e9, layers=4, q_heads=8, kv_heads=8, head_dim=100)
    hardware = Hardware(Gpu("toy", 1e12, bandwidth=1e11, flops=1e12), tp, Efficiency(1.0, 1.0, 1.0))
    found = throughput(toy, hardware, LazyShare(2, 100), 2, 1000, 100)
    assert found.weight_time == pytest.approx(0.08 / tp)  # 8 GB at 100 GB/s
    assert found.compute_time == pytest.approx(0.016 / tp)  # 2 x 4e9 x 2 products at 1e12/s
    # 8 heads x 100 x 2 bytes, K and V: 3,200 bytes a token and layer. 2 x 1,050 + 2 x 100 tokens a request.
    assert found.kv_time == pytest.approx(2 * 3200 * 2300 / tp / 1e11)
    # A full layer 500,000 pairs; a lazy one 95,000: 100 keys each, but 50 on average for the first 100.
    products = 2 * 4e9 * 1000 + 4 * 8 * 100 * (2 * 500_000 + 2 * 95_000)
    assert found.prefill_time == pytest.approx(products / tp / 1e12)
    step = found.weight_time + found.kv_time
    assert found.decode_rate == pytest.approx(2 / step)
    assert found.total_rate == pytest.approx(200 / (2 * found.prefill_time + 100 * step))


@pytest.mark.parametrize("tp", [1, 8])
def test_kv_of_a_request_is_that_of_all_ranks(tp: int) -> None:
    """Mistral-7B: 128 KiB a token. 16,384 tokens are 2 GiB, and 1 GiB + 16 layers' 1,024 with half lazy."""
    plan = plan_length(deployment(hardware=Hardware(A100, tp)), 16000, 384)
    assert plan.full_kv_gib == pytest.approx(2.0)
    assert plan.hybrid_kv_gib == pytest.approx(1.0 + 1 / 16)


# Four layers, two lazy, windows of 100; units are pages of one token in two layers. Four sinks.
BY_HAND = Demand(UnitShape(2, 2), 1, window=100, interval=10, chunk=400, context=10_000, sink_tokens=4)


@pytest.mark.parametrize(
    ("undecided", "first", "more"),
    [
        # Admitted with its tokens, a chunk and a window, though it will hold no more than two windows.
        (0, 1000 + (400 + 100) + 2 + 4, 1110 + (100 + 110) + 2 + 4),
        # Admitted with K and V of the prompt in all layers.
        (5000, 2 * 1000 + 2 + 4, 1110 + (100 + 110) + 2 + 4),
    ],
)
def test_requests_at_once_by_hand(undecided: int, first: int, more: int) -> None:
    """1,000 tokens in and 200 out: the last one admitted asks for ``first``, the others for ``more``.

    They hold most as their prompt's window is let go: two windows, and the tokens up to there.
    """
    demand, mix = BY_HAND.undecided_up_to(undecided), (Part(1000, 200),)
    assert demand.of_new(1000, 200) == first
    assert [requests_at_once(demand, units, mix) for units in (first - 1, first)] == [0, 1]
    assert [requests_at_once(demand, first + 7 * more + few, mix) for few in (-1, 0)] == [7, 8]
    assert requests_at_once(demand, first + 7 * more, mix, full_limit=5999) == 4


def test_a_mix_by_hand() -> None:
    """Half the requests output thrice as much, so of four that run three are such."""
    mix = (Part(50, 30, 0.5), Part(1000, 90, 0.5))
    assert running(mix) == [0.25, 0.75]
    # All 80 tokens in both kinds; 1,090 and a prompt's window beside the output's; two and the sinks each.
    mean = 0.25 * (2 * 80 + 6) + 0.75 * (1090 + (100 + 90) + 6)
    first = 1000 + 500 + 6
    assert [requests_at_once(BY_HAND, int(first + 5 * mean) + few, mix) for few in (-1, 1)] == [5, 6]


def test_a_mix_of_equal_parts_is_one_length() -> None:
    one, mixed = plan_length(deployment(), 8192, 200), plan_mix(deployment(), [Part(8192, 200, 0.5)] * 2)
    assert (mixed.full_requests, mixed.hybrid_requests) == (one.full_requests, one.hybrid_requests)
    assert mixed.decode_ratio == pytest.approx(one.decode_ratio)
    assert mixed.total_ratio == pytest.approx(one.total_ratio)
    assert (mixed.full_prefill, mixed.hybrid_prefill) == pytest.approx((one.full_prefill, one.hybrid_prefill))


def test_a_mix_is_between_its_parts() -> None:
    parts = [Part(512, 256, 0.8), Part(12000, 256, 0.2)]
    mixed = plan_mix(deployment(), parts)
    short, long = (plan_length(deployment(), part.input_tokens, part.output_tokens) for part in parts)
    for name in ("full_requests", "hybrid_requests"):
        assert getattr(long, name) < getattr(mixed, name) < getattr(short, name)
    assert short.total_ratio is not None and long.total_ratio is not None and mixed.total_ratio is not None
    assert short.total_ratio < mixed.total_ratio < long.total_ratio
    with pytest.raises(LightTransferError, match=r"32000 \+ 1000 tokens are more"):
        plan_mix(deployment(), [*parts, Part(32000, 1000, 0.1)])


def test_undecided_prompts_take_their_memory() -> None:
    """In dynamic mode the one in its prefill holds K and V of all layers: less than one request more."""
    dynamic = replace(HALF, mode="dynamic", keep=16)
    static, less = (plan_length(deployment(config=config), 16000, 384) for config in (HALF, dynamic))
    assert 0 <= static.hybrid_requests - less.hybrid_requests <= 1


@pytest.mark.parametrize(
    ("full", "layers", "proposed"), [(13, 32, 12), (15, 32, 16), (17, 32, 16), (8, 32, None), (10, 61, None)]
)
def test_a_number_of_full_layers_with_fewer_lists(full: int, layers: int, proposed: int | None) -> None:
    """8 of 32 has longer units than all near it; of 61, a prime, no number shares any."""
    assert better_split(full, layers) == proposed


def test_bound_at_the_ends() -> None:
    assert decode_bound(4096, 0.5, 1024) == pytest.approx(1.6, abs=1e-9)
    assert decode_bound(10**9, 0.75, 1024) == pytest.approx(4, abs=1e-4)
    assert decode_bound(800, 0.5, 1024) == 1
    assert decode_bound(10_000, 0.0, 1024) == 1


def test_kv_bytes() -> None:
    assert MISTRAL.kv_token_layer(2) == 4096
    assert kv_bytes(MISTRAL, 4096, NONE) == 32 * 4096 * 4096
    # Below the lazy window nothing changes.
    assert kv_bytes(MISTRAL, 800, LazyShare(16, 1024)) == kv_bytes(MISTRAL, 800, NONE)
    assert kv_bytes(MISTRAL, 4096, LazyShare(16, 1024), 1) * 2 == kv_bytes(MISTRAL, 4096, LazyShare(16, 1024))


def test_tensor_parallel_shards_kv_heads_down_to_one() -> None:
    per_rank = [LLAMA.kv_token_layer(2, tp) for tp in (1, 2, 4, 8, 16)]
    assert per_rank == [4096, 2048, 1024, 512, 512]


def test_without_compute_and_weights_the_ratio_is_the_bound() -> None:
    # No compute bound, negligible weights, a batch limited by memory and not rounded.
    shape = replace(MISTRAL, weight_bytes=1e-6)
    hardware = Hardware(replace(A100, flops=1e30))
    rates = []
    for lazy in (NONE, LazyShare(16, 1024)):
        requests = 60 * GIB / kv_bytes(shape, 32769, lazy)
        rates.append(throughput(shape, hardware, lazy, requests, 32768, 1).decode_rate)
    assert rates[1] / rates[0] == pytest.approx(decode_bound(32769, 0.5, 1024), abs=1e-3)


def test_weights_hide_the_gain_at_small_batches() -> None:
    small = [throughput(MISTRAL, Hardware(A100), lazy, 1, 4096, 128) for lazy in (NONE, LazyShare(16, 1024))]
    assert small[1].decode_rate / small[0].decode_rate < 1.03
    assert small[0].weight_time > small[0].kv_time


def test_plan_uses_the_servers_arithmetic() -> None:
    plan = plan_length(deployment(), 16384, 512)
    sizes = sizes_of(deployment(), 32768)
    assert sizes.demand == Demand(
        UnitShape(16, 16), 1, window=1020, interval=128, chunk=8192, context=32768, sink_tokens=4
    )
    rows = deployment().kv_budget // (16 * 4096)
    assert 0.999 * rows < sizes.units < rows, "but for tables and padding"
    assert plan.hybrid_requests == requests_at_once(sizes.demand, sizes.units, [Part(16384, 512)])
    assert plan.full_requests == deployment().kv_budget // (32 * 4096 * 16896)
    assert plan.limit == "reading KV"


def test_kv_memory_can_be_limited() -> None:
    limited = deployment(config=replace(HALF, kv_bytes=2**30))
    assert limited.kv_budget == 2**30
    assert deployment(config=replace(HALF, kv_bytes=2**30), kv_bytes=2**29).kv_budget == 2**29


def test_kv_budget_is_what_a_server_was_seen_to_have() -> None:
    # One H100, Mistral-7B: SGLang made a pool of 454,835 tokens.
    tokens = deployment(hardware=Hardware(GPUS["h100-80"])).kv_budget / (32 * 4096)
    assert tokens == pytest.approx(454_835, rel=0.02)


def test_requests_shorter_than_the_window() -> None:
    plan = plan_length(deployment(), 100, 28)
    assert plan.bound == 1
    # The same bytes as full KV, and a page and a sink set each.
    assert 0.95 * plan.full_requests < plan.hybrid_requests <= plan.full_requests


def test_no_lazy_layer_is_stock() -> None:
    plan = plan_length(deployment(config=LightTransferConfig(())), 8192, 512)
    assert plan.full_requests == plan.hybrid_requests
    assert plan.bound == plan.decode_ratio == plan.total_ratio == 1


def test_every_layer_lazy() -> None:
    plan = plan_length(deployment(config=LightTransferConfig(tuple(range(32)))), 16384, 512)
    assert plan.bound == pytest.approx(16896 / 1024)
    assert plan.hybrid_requests > 10 * plan.full_requests


def test_only_hybrid_fits() -> None:
    # 32 GiB of memory, 13.5 of weights: one request of 100K tokens needs 12.3 GiB, or half of it.
    small = deployment(
        shape=replace(MISTRAL, max_tokens=None), hardware=Hardware(replace(A100, memory=26 * GIB))
    )
    plan = plan_length(small, 100_000, 512)
    assert (plan.full_requests, plan.hybrid_requests) == (0, 1)
    assert plan.decode_ratio is None
    assert "nothing to compare with" in as_text(small, [plan], "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": LLAMA, "weights_bytes": LLAMA.total_weight_bytes}, "--tp 1: 131.4 GiB of weights"),
        ({"hardware": Hardware(replace(A100, memory=16.5 * GIB))}, "KV memory"),
    ],
)
def test_what_does_not_fit_says_so(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LightTransferError, match=message):
        plan_length(deployment(**changes), 8192, 512)


def test_longer_than_the_context() -> None:
    with pytest.raises(
        LightTransferError, match=r"32768 \+ 232 tokens are more than the 32768 .*--context-length"
    ):
        plan_length(deployment(), 32768, 232)


def test_report() -> None:
    made = deployment()
    plans = [plan_length(made, n, 512) for n in (512, 4096, 16384)]
    text = as_text(made, plans, "16 lazy layers")
    lines = text.splitlines()
    assert lines[1] == "16 lazy layers"
    assert "Mistral-7B" in lines[0] and "A100" in lines[2]
    assert any(line.split()[:2] == ["16384", "512"] for line in lines)
    assert "gain nothing" in text or plans[0].input_tokens + 512 > HALF.lazy_tokens
    assert max(len(line) for line in lines) <= 130
    data = as_dict(made, plans)
    assert data["lengths"][2]["hybrid_requests"] == plans[2].hybrid_requests and data["mix"] is None
    assert data["lighttransfer"]["lazy_layers"].startswith("1,3,5")


def test_shape_without_known_context_plans_any_length() -> None:
    shape = ModelShape("x", 1e9, 32, 8, 8, 128)
    assert plan_length(deployment(shape=shape, weights_bytes=2e9), 300_000, 1).full_requests >= 1


def test_known_kv_memory_is_taken_as_it_is() -> None:
    """Stock SGLang held 454,835 tokens on an H100: 27 requests of 16,584."""
    tokens = 454_835
    known = deployment(hardware=Hardware(GPUS["h100-80"]), kv_bytes=tokens * 32 * MISTRAL.kv_token_layer(2))
    plan = plan_length(known, 16384, 200)
    assert plan.full_requests == tokens // 16584 == 27
    assert known.kv_budget == tokens * 32 * 4096


def test_clients_can_be_fewer_than_memory_holds() -> None:
    free, eight = (plan_length(deployment(), 8192, 200, at_most) for at_most in (None, 8))
    assert (eight.full_requests, eight.hybrid_requests) == (8, 8) and free.full_requests > 8
    assert eight.decode_ratio is not None and free.decode_ratio is not None
    # What is left at an equal batch are the smaller reads; the weights are read once on both sides.
    assert 1 < eight.decode_ratio < free.decode_ratio
    assert eight.full_decode * eight.decode_ratio == pytest.approx(eight.hybrid_decode)
    assert eight.full_prefill > eight.hybrid_prefill > 0
