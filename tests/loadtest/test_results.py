"""What is made of measurements: bounds, ratios, result files, reports, parts of a long run."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from lt_sglang.bench import metrics_page, outcome
from lt_sglang.bench.bounds import bounds
from lt_sglang.bench.decode_log import Steady, steady_of
from lt_sglang.bench.machine import Machine
from lt_sglang.bench.result_file import Measured, build, ratios, write
from lt_sglang.bench.samples import Sample, summarize
from lt_sglang.bench.scenario import Scenario, Slo
from lt_sglang.bench.scenario_file import load_scenarios
from lt_sglang.bench.servers import COMMON_FLAGS, specs_of
from lt_sglang.bench.session import Session, describe
from lt_sglang.bench.wire import Answer, StreamError, read_event
from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.engine import EngineSpec
from lt_sglang.memory.demand import Demand
from lt_sglang.planner.shapes import GPUS, SHAPES

from .runs import REPOSITORY
from .runs import scenario as mapping
from .runs import write as write_file

FILES = REPOSITORY / "loadtest" / "scenarios"
H100 = Machine(("NVIDIA H100 80GB HBM3",), "580.1", 16, "Xeon")
CPU = Machine((), "", 2, "EPYC")
HALF = LightTransferConfig(tuple(range(8, 24)))
# What an H100 held with stock SGLang.
STOCK_TOKENS = 426_000


def table5(case: str) -> Scenario:
    return next(one for one in load_scenarios(FILES / "table5.yaml") if one.name.endswith(case))


def measured(output: float, running: int, decode: float, ttft: float = 0.5) -> Measured:
    some = [Sample(0, 0, "all", "ok", 0.0, 1.0, ttft, 100, 10, itls=(0.1,))]
    summary = {**summarize(some, Slo()), "output_throughput": output}
    return Measured(summary, Steady(running, decode, decode - 1, decode + 1, 9), {}, None, [])


def test_bounds_of_fp8_over_bfloat16_count_each_side_s_bytes() -> None:
    """Ours in fp8 holds twice what it does in bfloat16, in the bytes that stock has in bfloat16."""
    one = next(one for one in load_scenarios(FILES / "fp8.yaml") if one.name == "fp8-16k-over-bf16")
    sides = (one, SHAPES["mistral-7b"], HALF, 1, "h100-80", STOCK_TOKENS)
    fp8 = {"kv_cache_dtype": "fp8_e4m3"}
    same = bounds(*sides, {"kv_cache_dtype": "auto"}).ratios
    assert bounds(*sides, {"kv_cache_dtype": "auto"}, "auto").ratios == same
    over = bounds(*sides, {"kv_cache_dtype": "auto"}, "fp8_e4m3").ratios
    assert over["requests_running"] == pytest.approx(2 * same["requests_running"], rel=0.03)
    assert over["decode_tokens_per_second"] > 1.7 * same["decode_tokens_per_second"]
    # In fp8 on both sides each holds twice as many.
    both = bounds(*sides[:5], 2 * STOCK_TOKENS, fp8, "fp8_e4m3").ratios
    assert both["requests_running"] == pytest.approx(same["requests_running"], rel=0.03)


def test_bounds_of_table_5_are_the_planner_s() -> None:
    found = bounds(table5("16k"), SHAPES["mistral-7b"], HALF, 1, "h100-80", STOCK_TOKENS, {})
    assert found.ratios["requests_running"] == pytest.approx(1.88, abs=0.08)
    assert found.ratios["decode_tokens_per_second"] == pytest.approx(1.85, abs=0.1)
    # With prefill the gain is smaller, and still one.
    assert 1 < found.ratios["output_throughput"] < found.ratios["decode_tokens_per_second"]


@pytest.mark.parametrize("case", ["static", "dynamic"])
def test_the_bound_of_long_outputs_is_a_run_reckoned_step_by_step(case: str) -> None:
    """End to end: prompts one after the other, then 8,192 steps whose KV grows by a token a request."""
    one = next(one for one in load_scenarios(FILES / "long-output.yaml") if one.name.endswith(case))
    shape, gpu = SHAPES["mistral-7b"], GPUS["h100-80"]
    config = LightTransferConfig.from_dict(dict(one.engine.lighttransfer)).settle(shape.layers)
    # 0.4 of an H100's memory.
    found = bounds(one, shape, config, 1, "h100-80", 142_000, {"chunked_prefill_size": 8192}).ratios
    bandwidth = 0.8 * gpu.bandwidth

    def rate(requests: int, lazy_layers: int) -> float:
        token_layer = shape.kv_token_layer(2)
        work = 2 * shape.params * 2048 + 4 * shape.q_heads * shape.head_dim * (
            (shape.layers - lazy_layers) * 2048**2 / 2 + lazy_layers * (2048 - 512) * 1024
        )
        seconds = requests * work / (0.5 * gpu.flops)
        for made in range(8192):
            kept = (shape.layers - lazy_layers) * (2048 + made) + lazy_layers * 1024
            seconds += (shape.total_weight_bytes + requests * kept * token_layer) / bandwidth
        return requests * 8192 / seconds

    ours = round(13 * found["requests_running"])
    assert ours == 24
    assert found["output_throughput"] == pytest.approx(rate(ours, 16) / rate(13, 0), rel=0.002)
    # A memory's worth of requests, and not the 256 that the file allows.
    assert found["output_throughput"] == pytest.approx(1.75, abs=0.05)


@pytest.mark.parametrize("case", ["static", "dynamic"])
def test_the_bound_of_prompt_heavy_traffic_is_a_gain(case: str) -> None:
    one = next(one for one in load_scenarios(FILES / "prompt-heavy.yaml") if one.name.endswith(case))
    config = LightTransferConfig.from_dict(dict(one.engine.lighttransfer)).settle(32)
    found = bounds(one, SHAPES["mistral-7b"], config, 1, "h100-80", STOCK_TOKENS, {}).ratios
    assert found["output_throughput"] == pytest.approx(1.26, abs=0.02)


def test_an_equal_batch_has_the_same_requests() -> None:
    one = replace(table5("16k"), load=replace(table5("16k").load, users=8))
    found = bounds(one, SHAPES["mistral-7b"], HALF, 1, "h100-80", STOCK_TOKENS, {})
    assert found.ratios["requests_running"] == 1
    assert found.ratios["decode_tokens_per_second"] == pytest.approx(1.35, abs=0.05)


def test_a_cpu_has_no_bound_on_speed() -> None:
    found = bounds(table5("16k"), SHAPES["mistral-7b"], HALF, 1, None, STOCK_TOKENS, {})
    assert set(found.ratios) == {"requests_running"} and "CPU" in found.remark


def test_traffic_that_shares_prefixes_has_no_bound() -> None:
    for name in ("prefix-shared", "chat"):
        for one in load_scenarios(FILES / f"{name}.yaml"):
            found = bounds(one, SHAPES["mistral-7b"], HALF, 1, "h100-80", STOCK_TOKENS, {})
            assert not found.ratios and found.remark.startswith("No bound")


def test_ratios_are_of_medians_and_their_spread_of_pairs() -> None:
    base = [measured(100, 10, 50), measured(110, 10, 52), measured(90, 10, 48)]
    ours = [measured(180, 18, 90), measured(180, 18, 91), measured(198, 18, 96)]
    found, spread = ratios(base, ours, ("requests_running", "decode_tokens_per_second", "output_throughput"))
    assert found == {"requests_running": 1.8, "decode_tokens_per_second": 1.82, "output_throughput": 1.8}
    assert spread["output_throughput"] == [pytest.approx(180 / 110, abs=1e-4), 2.2]
    faster, _ = ratios([measured(1, 1, 1, ttft=0.9)], [measured(1, 1, 1, ttft=0.6)], ("prefill_speed",))
    assert faster == {"prefill_speed": 1.5}


@pytest.mark.parametrize("machine", [H100, CPU], ids=["gpu", "cpu"])
def test_a_result_file_feeds_the_table(machine: Machine, tmp_path: Path) -> None:
    one = table5("16k")
    specs = specs_of(one, tmp_path, ["flashinfer"])
    limits = bounds(one, SHAPES["mistral-7b"], HALF, 1, machine.planned_gpu, STOCK_TOKENS, {})
    result = build(
        one,
        machine,
        {"baseline": specs["flashinfer"], "lighttransfer": specs["lighttransfer"]},
        {"baseline": [measured(300, 25, 1035)], "lighttransfer": [measured(380, 47, 1901)]},
        limits,
        ["a note"],
    )
    path = write(result, tmp_path, "2026-01-02", machine.label)
    assert path.name == f"2026-01-02-{machine.label}-table5-16k.json"
    data = json.loads(path.read_text())
    assert data["workload"]["model"] == "mistral-7b shape, dummy weights, tp 1"
    assert data["baseline"]["engine"] == "stock_flashinfer" and data["baseline"]["requests_running"] == 25
    assert data["ratio"]["decode_tokens_per_second"] == pytest.approx(1.837, abs=0.001)
    for name, bound in data["bound"].items():
        assert data["measured_over_bound"][name] == pytest.approx(data["ratio"][name] / bound, abs=2e-4)
    # A CPU's speed is nobody's business; only ratios and counts are kept.
    times = re.findall(
        r'"(\w+(?:_ms|_seconds|_throughput|tokens_per_second))": [0-9]',
        json.dumps([data["baseline"], data["lighttransfer"]]),
    )
    assert bool(times) == bool(machine.gpus)


def test_both_sides_get_the_same_flags(tmp_path: Path) -> None:
    for file in sorted(FILES.rglob("*.yaml")):
        for one in load_scenarios(file):
            specs = specs_of(one, tmp_path, ["flashinfer"], "m", flags=("--log-level", "info"))
            ours = specs.pop("lighttransfer")
            for stock in specs.values():
                common = [flag for flag in stock.flags if flag in ours.flags]
                own = len(one.engine.baseline_flags), len(one.engine.lighttransfer_flags)
                assert len(stock.flags) - own[0] == len(ours.flags) - own[1] <= len(common)
                assert "{tp}" not in " ".join(stock.flags)
                assert (stock.tp, stock.model) == (ours.tp, ours.model)


def test_command_lines(tmp_path: Path) -> None:
    specs = specs_of(table5("16k"), tmp_path, ["triton"], options=("--lt-recent-tokens=508",))
    stock, env = specs["triton"].command(1234)
    assert stock[stock.index("--attention-backend") + 1] == "triton" and env["SGLANG_PLUGINS"] == "none"
    ours, _ = specs["lighttransfer"].command(1234)
    assert ours[ours.index("--attention-backend") + 1] == "lighttransfer"
    config = json.loads(ours[ours.index("--json-model-override-args") + 1])["lighttransfer"]
    assert config["lazy_layers"] == "8-23" and config["recent_tokens"] == 508
    for part in (
        "--decode-log-interval",
        "--enable-metrics",
        "--load-format",
        "--disable-prefill-cuda-graph",
    ):
        assert part in stock and part in ours


def test_a_scenario_without_a_shape_needs_a_model(tmp_path: Path) -> None:
    (one,) = load_scenarios(write_file(tmp_path, mapping()))
    with pytest.raises(LightTransferError, match="--model-path"):
        specs_of(one, tmp_path, [])
    flags = (*COMMON_FLAGS, "--tp-size", "1")
    assert specs_of(one, tmp_path, [], "m")["lighttransfer"] == EngineSpec("lighttransfer", "m", flags)
    # A model takes a shape's place, and has weights and a tokenizer.
    real = specs_of(table5("16k"), tmp_path, ["triton"], "m")
    assert {spec.model for spec in real.values()} == {"m"}
    assert not any("--load-format" in spec.flags for spec in real.values())


def test_steady_decode_leaves_prefill_out() -> None:
    def line(running: int, rate: float) -> str:
        return f"Decode batch, #running-req: {running}, #token: 5, gen throughput (token/s): {rate}, #queue"

    lines = [line(4, 9.0), "Prefill batch", line(8, 3.0), line(8, 80.0), line(8, 90.0), line(8, 82.0)]
    assert steady_of(lines) == Steady(8, 82.0, 80.0, 90.0, 3)
    assert steady_of(["Prefill batch", line(8, 3.0)]) is None


def test_steady_decode_of_dp_attention_is_the_ranks_sum() -> None:
    def line(rank: int, running: int, rate: float) -> str:
        mark = f"[2026-01-02 DP{rank} TP{rank}]"
        return f"{mark} Decode batch, #running-req: {running}, gen throughput (token/s): {rate}, #queue"

    prefill = "[2026-01-02 DP1 TP1] Prefill batch"
    # One rank's prefill stops the others' decode.
    lines = [line(0, 2, 9.0), prefill, line(0, 2, 1.0), line(1, 3, 2.0), line(0, 2, 20.0), line(1, 3, 30.0)]
    lines += [line(0, 2, 22.0), line(1, 3, 32.0), line(1, 3, 34.0)]
    assert steady_of(lines) == Steady(5, 53.0, 50.0, 56.0, 2)
    assert steady_of([*lines, line(2, 1, 5.0)]) is None


SERVER_INFO = {
    "model_path": "/models/m",
    "version": "0.5.23",
    "internal_states": [{"lighttransfer": {"mode": "static", "lazy_layers": "1-3"}}],
}


def test_outputs_of_a_run(tmp_path: Path) -> None:
    (one,) = load_scenarios(write_file(tmp_path, mapping(about='1 < 2 & "3"', slo={"ttft_ms": 600})))
    session = Session(one, "http://127.0.0.1:1", lambda _: None)
    session.samples = [
        Sample(0, 0, "all", "ok", 0.0, 1.5, 0.5, 100, 11, itls=(0.1,) * 10),
        Sample(1, 0, "all", "error", 0.5, 1.0, None, 0, 0, error="HTTP 500: <b>"),
    ]
    session.engine = describe(SERVER_INFO)
    session.lt_metrics = {"lt_pool_slots (pool full)": 7.0}
    verdicts = outcome.finish(session, tmp_path / "out")
    assert [str(one) for one in verdicts] == ["FAIL errors <= 0: 1"]
    rows = outcome.read_samples(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "error"]
    assert float(rows[0]["ttft"]) == 0.5 and rows[1]["ttft"] == ""
    assert next(csv.reader(io.StringIO((tmp_path / "out" / "samples.csv").read_text()))) == list(
        outcome.COLUMNS
    )
    data = outcome.read_summary(tmp_path / "out")
    assert data["summary"]["median_ttft_ms"] == 500 and data["gates"][0]["passed"] is False
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    for told in ("/models/m", "lazy layers 1-3", "lt_pool_slots (pool full)", "UTC", "tokens/s", "sglang 0."):
        assert told in page
    assert "1 &lt; 2" in page and "&lt;b&gt;" in page and "FAIL errors" in page
    # One file that can be mailed: it loads nothing.
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    for name in ("latencies", "timeline", "in_flight"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_what_the_server_counted() -> None:
    page = """\
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{is_streaming="true"} 100.0
sglang:prompt_tokens_total{is_streaming="false"} 20.0
# TYPE sglang:time_to_first_token_seconds histogram
sglang:time_to_first_token_seconds_bucket{le="+Inf"} 4.0
sglang:time_to_first_token_seconds_sum 2.0
sglang:time_to_first_token_seconds_count 4.0
"""
    before = metrics_page.read(page)
    assert before["input_tokens"] == 120 and before["requests"] == 0
    after = page.replace("100.0", "200.0").replace("sum 2.0", "sum 5.0").replace("count 4.0", "count 10.0")
    change = metrics_page.between(page, after)
    assert change is not None and change["input_tokens"] == 100
    assert change["mean_ttft_ms"] == pytest.approx(500) and "mean_e2e_ms" not in change
    assert metrics_page.read(page.replace("sglang:", "sglang_")) == before
    assert metrics_page.between(None, after) is None


def test_figures_of_lazy_layers_are_shown_by_their_labels() -> None:
    page = """\
# TYPE lt_pool_slots gauge
lt_pool_slots{pool="full"} 7.0
lt_pool_slots{pool="streaming"} 3.0
# TYPE lt_lookup_seconds histogram
lt_lookup_seconds_bucket{le="+Inf"} 4.0
# TYPE other gauge
other 1.0
"""
    assert metrics_page.lazy_layers(page) == {
        "lt_pool_slots (pool full)": 7.0,
        "lt_pool_slots (pool streaming)": 3.0,
    }
    assert metrics_page.lazy_layers(None) == {}


def test_how_layers_were_chosen_is_what_happened_between_two_pages(tmp_path: Path) -> None:
    page = """\
# TYPE lt_layer_lazy_requests_total counter
lt_layer_lazy_requests_total{layer="2"} 2.0
lt_layer_lazy_requests_total{layer="10"} 2.0
# TYPE lt_identification_seconds_total counter
lt_identification_seconds_total 1.5
"""
    after = page.replace('"2"} 2.0', '"2"} 9.0').replace('"10"} 2.0', '"10"} 3.0').replace("1.5", "1.75")
    found = metrics_page.choices(page, after)
    assert found == {"identification_seconds": 0.25, "lazy_requests": {"2": 7, "10": 1}}
    assert list(found["lazy_requests"]) == ["2", "10"]
    assert metrics_page.choices(None, "# TYPE other gauge\nother 1.0\n") == {}

    scenario = table5("16k")
    specs = specs_of(scenario, tmp_path, [])
    limits = bounds(scenario, SHAPES["mistral-7b"], HALF, 1, "h100-80", STOCK_TOKENS, {})
    runs = {"lighttransfer": [replace(measured(1.0, 1, 1.0), choices=found)]}
    side = build(scenario, H100, specs, runs, limits, [])["lighttransfer"]
    assert side["lazy_requests"] == {"2": 7, "10": 1}
    assert side["each_run"][0]["identification_seconds"] == 0.25


def test_pages_are_read_when_all_answers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server publishes its lt_* figures once a second."""
    pages = iter(["lt_layer_lazy_requests_total 1", "lt_layer_lazy_requests_total 7", "other 1"])
    monkeypatch.setattr(metrics_page, "scrape", lambda _: next(pages))
    waited: list[float] = []
    session = Session(table5("16k"), "http://127.0.0.1:1", waited.append)
    assert session._page() == "lt_layer_lazy_requests_total 7" and waited == [metrics_page.PUBLISHED_S]
    assert session._page() == "other 1" and len(waited) == 1


def test_cached_tokens_are_unknown_where_an_answer_does_not_say() -> None:
    one = Sample(0, 0, "all", "ok", 0.0, 1.0, 0.5, 100, 10, cached_tokens=60)
    assert summarize([one, one], Slo())["cached_tokens"] == 120
    assert summarize([one, replace(one, cached_tokens=None)], Slo())["cached_tokens"] is None


def event(tokens: int, ids: list[int], **meta: Any) -> bytes:
    info = {"completion_tokens": tokens, "prompt_tokens": 7, "finish_reason": None, **meta}
    return json.dumps({"output_ids": ids, "meta_info": info}).encode()


@pytest.mark.parametrize("incremental", [True, False])
def test_events_of_generate(incremental: bool) -> None:
    answer = Answer()
    for chunk, total in (([5], [5]), ([6, 7], [5, 6, 7]), ([8], [5, 6, 7, 8])):
        read_event("generate", event(len(total), chunk if incremental else total), answer)
        assert answer.tokens and answer.output_ids == tuple(total)
    read_event("generate", event(4, [] if incremental else [5, 6, 7, 8]), answer)
    assert not answer.tokens and answer.output_tokens == 4


def test_errors_inside_a_stream() -> None:
    aborted = json.dumps({"meta_info": {"finish_reason": {"type": "abort", "message": "no memory"}}})
    for data, message in (
        (aborted, "aborted by the server: no memory"),
        ('{"error": {"message": "too long"}}', "too long"),
        ("{", "not JSON"),
    ):
        with pytest.raises(StreamError, match=message):
            read_event("generate", data.encode(), Answer())


def test_every_comparison_holds_its_roofline() -> None:
    results = REPOSITORY / "loadtest" / "results"

    def of(name: str) -> dict[str, float]:
        found: dict[str, float] = json.loads((results / f"{name}.json").read_text())["bound"]
        return found

    # What the planner says for stock's 413,160 tokens of an H100, whole requests and weights included.
    full = of("2026-11-22-h100-lt-half-16k-decode-16384")
    assert full == {"requests_running": pytest.approx(47 / 25, abs=1e-4), "decode_tokens_per_second": ANY}
    assert full["decode_tokens_per_second"] == pytest.approx(1.87, abs=0.03)
    # The same eight requests on both sides: weights count for more.
    eight = of("2026-11-21-h100-lt-half-16k-decode-16384-batch8")
    assert eight["requests_running"] == 1 and 1.2 < eight["decode_tokens_per_second"] < 1.4
    assert set(of("2026-11-22-h100-lt-half-16k-prefill-32768")) == {"prefill_speed"}
    # Lazy layers on both sides.
    assert of("2026-11-22-h200-dynamic-16k-decode-16384-vs-static") == {}


def test_the_peak_of_a_prefill_is_what_is_reckoned() -> None:
    """Of every server that was measured, with the arithmetic of today."""
    file = REPOSITORY / "loadtest" / "results" / "2026-11-30-cpu-peak-kv.json"
    rows = json.loads(file.read_text())["rows"]
    ours = [row for row in rows if row["mode"] != "stock"]
    assert len(ours) == 6 and {row["chunks"] for row in rows} == {1, 8}
    for row in ours:
        demand = Demand.from_dict(row["demand"])
        reckoned = demand.of_new(row["prompt"], 1)
        assert reckoned == row["reckoned_units"] and 0.99 * reckoned <= row["needed"]["units"] <= reckoned
        assert row["needed"]["bytes"] == row["needed"]["units"] * row["unit_bytes"] <= row["in_use"]["bytes"]
    layers = {(row["mode"], row["chunks"]): row["needed"]["layers_of_the_prompt"] for row in rows}
    assert all(layers[mode, 1] >= 6 for mode in {row["mode"] for row in rows})
    assert layers["dynamic", 8] >= 6 and layers["stock", 8] == 6
    # The paper's P + 1, for P = 3.
    assert max(layers["static", 8], layers["dynamic, first chunk", 8]) < 4
