"""What a bench starts, in which order, and what it measures only once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lt_sglang.bench import compare
from lt_sglang.bench.capacity import check_fits, held, longest_request
from lt_sglang.bench.compare import Cell, plan
from lt_sglang.bench.fill import filled
from lt_sglang.bench.machine import COMMIT_VARIABLE, command_line, gpu_memory_mib, stamp, this_machine
from lt_sglang.bench.runner import run_scenario
from lt_sglang.bench.samples import Sample, summarize
from lt_sglang.bench.scenario import Scenario
from lt_sglang.bench.scenario_file import load_scenarios
from lt_sglang.bench.servers import LIGHTTRANSFER, specs_of
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.engine import EngineSpec
from lt_sglang.memory.demand import Demand
from lt_sglang.memory.units import UnitShape
from lt_sglang.planner.capacity import RESERVE_BYTES
from lt_sglang.planner.mix import Part
from lt_sglang.planner.roofline import LazyShare, kv_bytes
from lt_sglang.planner.shapes import CONFIGS, GPUS, shape_from_config

from .runs import REPOSITORY, dump, run, scenario, write
from .slow_server import Delays, serve

TP8 = REPOSITORY / "loadtest" / "scenarios" / "tp8"


def cells(work: Path, file: str, folder: Path = TP8) -> list[Cell]:
    found = load_scenarios(folder / file)
    return [Cell(one, specs_of(one, work, ["flashinfer"], most_tp=4)) for one in found]


def started(work: Path, *files: str, rounds: int = 1) -> list[tuple[str, list[str]]]:
    """Each start: the server, and the scenarios measured on it."""
    groups = [cells(work, file) for file in files]
    return [
        (start.spec.name, [cell.scenario.name.removeprefix("table6-") for cell in start.cells])
        for start in plan(groups, rounds)
    ]


def test_a_server_is_started_once_for_all_it_measures(tmp_path: Path) -> None:
    assert started(tmp_path, "1-table6.yaml") == [
        ("stock_flashinfer", ["16k-half", "32k-half"]),
        (LIGHTTRANSFER, ["16k-half", "32k-half"]),
    ]


def test_a_file_reuses_what_another_measured(tmp_path: Path) -> None:
    """DP attention has memory of its own: both sides run again. Three quarters need no second stock run."""
    files = ("1-table6.yaml", "2-dp-attention.yaml", "4-three-quarters.yaml")
    assert started(tmp_path, *files)[2:] == [
        ("stock_flashinfer", ["dp-attention-16k", "dp-attention-32k"]),
        (LIGHTTRANSFER, ["dp-attention-16k", "dp-attention-32k"]),
        ("stock_flashinfer", ["dp-attention-16k-quick"]),
        (LIGHTTRANSFER, ["dp-attention-16k-quick"]),
        ("stock_flashinfer", ["dp-attention-16k-quick-against-tp"]),
        ("stock_flashinfer", ["dp-attention-16k-two-gpus"]),
        (LIGHTTRANSFER, ["dp-attention-16k-two-gpus"]),
        ("stock_flashinfer", ["dp-attention-16k-two-gpus-against-tp"]),
        (LIGHTTRANSFER, ["16k-three-quarters", "32k-three-quarters"]),
    ]


def test_one_server_a_mode_for_all_lengths(tmp_path: Path) -> None:
    """Of the folder elastic. Two rows have flags or layers of their own."""
    files = ("1-short.yaml", "2-long.yaml", "3-changing.yaml")
    every = [cell for file in files for cell in cells(tmp_path, file, TP8.parent / "elastic")]
    others = ("three-quarters", "2k-8k")
    shared = [cell for cell in every if not any(name in cell.scenario.name for name in others)]
    for mode in ("static", "dynamic"):
        specs = [cell.specs for cell in shared if cell.scenario.name.endswith(mode)]
        assert len(specs) == 11 and len({one[LIGHTTRANSFER] for one in specs}) == 1
    against = [cell for cell in shared if "phase" not in cell.scenario.name]
    assert len({cell.specs["flashinfer"] for cell in against}) == 1
    starts = plan([every], rounds=1)
    assert [start.spec.name for start in starts].count(LIGHTTRANSFER) == 6
    assert [start.spec.name for start in starts].count("stock_flashinfer") == 2
    known = {"lazy_layers", "mode", "keep", "sink_tokens", "recent_tokens"}
    assert all(set(cell.scenario.engine.lighttransfer) <= known for cell in every), "no hint on lengths"


@pytest.mark.parametrize("file", ["prompt-heavy.yaml", "long-output.yaml"])
def test_stock_runs_once_for_both_modes(file: str, tmp_path: Path) -> None:
    starts = plan([cells(tmp_path, file, TP8.parent)], rounds=1)
    assert [start.spec.name for start in starts] == ["stock_flashinfer", LIGHTTRANSFER, LIGHTTRANSFER]
    assert len({start.spec for start in starts}) == 3


def test_four_servers_show_fp8_against_lazy_layers_and_both(tmp_path: Path) -> None:
    """Of fp8.yaml: each side in fp8 and in bfloat16; ours in fp8 runs once for both comparisons."""
    starts = plan([cells(tmp_path, "fp8.yaml", TP8.parent)], rounds=1)
    assert [start.spec.name for start in starts].count(LIGHTTRANSFER) == 2
    assert len({start.spec for start in starts}) == len(starts) == 4
    of_16k = [cell for cell in cells(tmp_path, "fp8.yaml", TP8.parent) if "-16k" in cell.scenario.name]
    assert len({cell.specs[LIGHTTRANSFER] for cell in of_16k}) == 2
    assert len({cell.specs["flashinfer"] for cell in of_16k}) == 2


def test_dp_attention_is_compared_in_memory_that_holds_long_prompts(tmp_path: Path) -> None:
    cases = {one.name: one for one in load_scenarios(TP8 / "2-dp-attention.yaml")}
    fractions = {"16k": "0.9", "32k": "0.9", "16k-quick": "0.6", "16k-two-gpus": "0.85"}
    flags = ("--mem-fraction-static", "0.40")
    for name, fraction in fractions.items():
        one = cases.pop(f"table6-dp-attention-{name}")
        specs = specs_of(one, tmp_path, ["flashinfer"], most_tp=4, flags=flags)
        dp = specs["flashinfer"]
        assert Path(dp.model).name == "llama-3-70b-qwen3"
        assert dp.flags[-5:-2] == ("--enable-dp-attention", "--dp-size", "4")
        # The last one counts.
        assert {spec.flags[-2:] for spec in specs.values()} == {("--mem-fraction-static", fraction)}
        tp_case = cases.pop(f"table6-dp-attention-{name}-against-tp", None)
        if tp_case:
            # The same half-lazy server, against stock without DP attention.
            against_tp = specs_of(tp_case, tmp_path, ["flashinfer"], most_tp=4, flags=flags)
            assert against_tp[LIGHTTRANSFER] == specs[LIGHTTRANSFER]
            assert against_tp["flashinfer"].flags == against_tp[LIGHTTRANSFER].flags
    assert not cases
    assert prompts_of_a_dp_rank("h200-141", 4, 0.9) == 7
    assert prompts_of_a_dp_rank("h100-80", 8, 0.9) == 3
    assert prompts_of_a_dp_rank("h200-141", 4, 0.6, tokens=16384) == 6
    assert prompts_of_a_dp_rank("h200-141", 2, 0.85, tokens=16384) == 7


def prompts_of_a_dp_rank(gpu: str, ranks: int, fraction: float, tokens: int = 32768) -> int:
    """Prompts beside the weights of a rank: attention and the embedding whole, a part of the rest."""
    model = CONFIGS["llama-3-70b-qwen3"]
    shape = shape_from_config(model, "llama-3-70b-qwen3")
    width = 2 * (shape.q_heads + shape.kv_heads) * shape.head_dim
    whole = model["hidden_size"] * (shape.layers * width + model["vocab_size"])
    weights = shape.weight_bytes * (whole + (shape.params - whole) / ranks)
    room = GPUS[gpu].memory * fraction - RESERVE_BYTES - weights
    return int(room / kv_bytes(shape, tokens + 128, LazyShare(0, 0)))


def test_rounds_alternate_and_start_everything_again(tmp_path: Path) -> None:
    once = started(tmp_path, "1-table6.yaml")
    assert started(tmp_path, "1-table6.yaml", rounds=2) == once + once[::-1]


def server(**state: Any) -> dict[str, Any]:
    return {"internal_states": [state]}


# Half of 32 layers lazy, a unit a token: a chunk of 8,192 and the windows of 4 + 1020.
DEMAND = Demand(UnitShape(16, 16), 1, window=1020, interval=128, chunk=8192, context=40_000, sink_tokens=4)
MEMORY = {"units": 625_000, "demand": DEMAND.to_dict(), "full_limit": None, "longest_request": 40_000}
DYNAMIC = {**MEMORY, "demand": DEMAND.undecided_up_to(40_000).to_dict()}


@pytest.mark.parametrize(
    ("info", "prompt", "requests"),
    [
        (server(memory_usage={"token_capacity": 314433}), 16384, 18),
        # Two ranks of DP attention, neither of which can take the other's rest.
        ({"internal_states": [{"memory_usage": {"token_capacity": 29999}}] * 2}, 9800, 4),
        # 34 hold 16,584 and two windows; one more asks for a chunk besides.
        (server(lighttransfer={"memory": MEMORY}), 16384, 34),
        (server(lighttransfer={"memory": MEMORY}), 32768, 18),
        (server(lighttransfer={"memory": MEMORY}), 4096, 112),
        (server(lighttransfer={"memory": {**MEMORY, "full_limit": 170_000}}), 16384, 10),
        # The last one holds its whole prompt in all layers until it is decided.
        (server(lighttransfer={"memory": DYNAMIC}), 32768, 17),
    ],
)
def test_how_many_requests_a_server_holds(info: dict[str, Any], prompt: int, requests: int) -> None:
    assert held(info, [Part(prompt, 200)]) == requests


def test_memory_is_filled_once(tmp_path: Path) -> None:
    load = {"kind": "closed", "users": 40, "requests": 80, "fill": True}
    (one,) = load_scenarios(write(tmp_path, scenario(load=load, traffic={"input": 90, "output": 10})))
    for capacity, requests in ((2050, 20), (100, 1), (6000, 40)):
        fitting = filled(one, server(memory_usage={"token_capacity": capacity}), "it").load
        assert fitting.users == fitting.requests == requests
    with pytest.raises(LightTransferError, match="does not say how many tokens"):
        filled(one, server(), "it")
    with pytest.raises(
        LightTransferError, match="the KV memory of it holds 99 tokens, and a request needs 100"
    ):
        filled(one, server(memory_usage={"token_capacity": 99}), "it")


@pytest.mark.parametrize(
    ("traffic", "prompt", "output"),
    [
        ({"input": 90, "output": 10}, 90, 10),
        (
            {
                "input": {"uniform": {"low": 5, "high": 90}},
                "output": 10,
                "shared": {"prefixes": 2, "tokens": 7},
            },
            97,
            10,
        ),
        # The last turn repeats the others' questions and answers.
        ({"input": 90, "output": 10, "turns": 3}, 290, 10),
    ],
)
def test_the_longest_request_must_fit(traffic: Any, prompt: int, output: int, tmp_path: Path) -> None:
    (one,) = load_scenarios(write(tmp_path, scenario(traffic=traffic)))
    assert longest_request(one.traffic[0]) == (prompt, output)
    needed = prompt + output
    for state in (
        {"memory_usage": {"token_capacity": needed}},
        {"lighttransfer": {"memory": {"longest_request": needed}}},
    ):
        check_fits(one, {"internal_states": [state]}, "it")
    # What is not known is not refused.
    check_fits(one, server(), "it")
    with pytest.raises(LightTransferError, match=f"holds {needed - 1} tokens on each of 2 ranks"):
        check_fits(one, {"internal_states": [{"memory_usage": {"token_capacity": needed - 1}}] * 2}, "it")


class ServerWithLittleMemory:
    """In place of an engine of two ranks under DP attention."""

    url = ""

    def __init__(self, spec: EngineSpec, log: Path, **_: Any) -> None:
        self.spec, self.log = spec, log

    def __enter__(self) -> ServerWithLittleMemory:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def info(self) -> dict[str, Any]:
        return {"internal_states": [{"memory_usage": {"token_capacity": 11859}}] * 2}


def test_a_bench_says_that_a_prompt_does_not_fit_and_sends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def send(*_: Any) -> None:
        raise AssertionError("something was sent")

    monkeypatch.setattr(compare, "Engine", ServerWithLittleMemory)
    monkeypatch.setattr(compare, "run_scenario", send)
    one = load_scenarios(TP8 / "2-dp-attention.yaml")[0]
    settings = compare.Settings(tmp_path, tmp_path / "out", "2026-01-02", this_machine(), rounds=1)
    assert compare.Bench(settings).run([[one]]) == 1
    said = capsys.readouterr().out
    for name in ("stock_flashinfer", LIGHTTRANSFER):
        assert (
            f"table6-dp-attention-16k: {name}: does not fit: the KV memory of {name} holds 11859 tokens on "
            "each of 2 ranks, and a request needs 16512 (prompt 16384, output 128)"
        ) in said


class Answering(ServerWithLittleMemory):
    """In place of an engine that holds enough."""

    admin_key = None

    def info(self) -> dict[str, Any]:
        return {"internal_states": [{"memory_usage": {"token_capacity": 10**6}}]}

    def flush(self) -> None:
        pass

    def log_position(self) -> int:
        return 0

    def log_since(self, position: int) -> list[str]:
        return []


def test_each_repeat_has_prompts_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for every server and round; and what the server retracted is in the file."""
    sent: dict[str, list[int]] = {}

    def send(one: Scenario, url: str, out: Path, *_: Any) -> dict[str, Any]:
        name = "ours" if LIGHTTRANSFER in out.name else "stock"
        sent.setdefault(name, []).append(one.seed)
        summary = summarize([Sample(0, 0, "all", "ok", 0.0, 1.0, 0.5, 8, 6)], one.slo)
        retracted = 2.0 if name == "ours" and one.seed == 8 else 0.0
        return {"summary": summary, "gates": [], "server": {"retractions": retracted}}

    monkeypatch.setattr(compare, "Engine", Answering)
    monkeypatch.setattr(compare, "run_scenario", send)
    engine = {"shape": "tiny", "lighttransfer": {"lazy_layers": "2-5"}}
    (one,) = load_scenarios(write(tmp_path, scenario(seed=7, engine=engine)))
    settings = compare.Settings(tmp_path, tmp_path / "out", "2026-01-02", this_machine(), rounds=2, repeats=3)
    assert compare.Bench(settings).run([[one]]) == 0
    assert sent == {"stock": [7, 8, 9] * 2, "ours": [7, 8, 9] * 2}
    (file,) = (tmp_path / "out").glob("*.json")
    result = json.loads(file.read_text())
    assert (result["baseline"]["retractions"], result["lighttransfer"]["retractions"]) == (0, 2)


def test_a_run_without_a_result_says_why(tmp_path: Path) -> None:
    load = {"kind": "closed", "users": 1, "requests": 1, "warmup": 1}
    (one,) = load_scenarios(write(tmp_path, scenario(load=load)))
    with pytest.raises(LightTransferError) as raised:
        run_scenario(one, "http://127.0.0.1:9", tmp_path / "out")
    text = str(raised.value)
    assert text.startswith("small: locust measured nothing: http://127.0.0.1:9: the warm-up failed: ")
    assert "no connection" in text and text.endswith(f"see {tmp_path / 'out' / 'locust.log'}")
    assert "\n" not in text


def test_filling_needs_a_server_that_says_what_it_holds(tmp_path: Path) -> None:
    load = {"kind": "closed", "users": 2, "requests": 2, "warmup": 0, "fill": True}
    with serve(Delays(first=0.01, between=0.01)) as url:
        done = run(url, scenario(load=load), tmp_path)
    assert done.code == 2 and "load.fill needs SGLang's /server_info" in done.text


def test_filling_sends_what_fits_and_waits_for_all_of_it(tmp_path: Path) -> None:
    """Users beyond it must not even start: stopped later, they would take their answers with them."""
    load = {"kind": "closed", "users": 200, "requests": 200, "warmup": 1, "fill": True}
    delays = Delays(first=0.5, between=0.1, info=server(memory_usage={"token_capacity": 5 * (8 + 30)}))
    with serve(delays) as url:
        done = run(url, scenario(load=load, traffic={"input": 8, "output": 30}), tmp_path)
    assert done.code == 0, dump(done)
    assert done.summary["completed"] == 5 and done.summary["errors"] == 0
    assert len(delays.requests) == 6 and not delays.dropped


def test_only_gpus_that_may_be_used_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on the CPU of a machine whose GPUs others use is measured as one on a CPU."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=1*) ;; *) echo 70000, 580.1 ;; esac\necho 123, 580.1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for visible, names in ((None, ("70000", "123")), ("1", ("123",)), ("", ()), ("-1", ())):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert this_machine().gpus == names
    assert gpu_memory_mib() == []


def test_the_commit_of_a_copy_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, "abc1234")
    assert this_machine().commit == "abc1234"


@pytest.mark.parametrize(
    ("main", "argv", "expected"),
    [
        (
            "lt_sglang.__main__",
            ["/some/where/__main__.py", "bench", "a b.yaml", "--api-key", "s3cret", "--admin-api-key=s3cret"],
            "lt-sglang bench 'a b.yaml' --api-key '<redacted>' '--admin-api-key=<redacted>'",
        ),
        (
            "lt_sglang.__main__",
            [
                *("x", "eval", "--engine", "a=--api-key s3cret --tp 2", "--url", "http://user:s3cret@host:1"),
                *(
                    "--hicache-storage-backend-extra-config",
                    '{"a": "s3cret"}',
                    "--ssl-keyfile-password=s3cret",
                ),
                *("--json-model-override-args", '{"api_key": "s3cret", "hidden_size": 8}'),
                *("--watermark-config", '{"key": "s3cret"}', "--max-total-tokens", "7"),
            ],
            "lt-sglang eval --engine 'a=--api-key '\"'\"'<redacted>'\"'\"' --tp 2' "
            "--url 'http://<redacted>@host:1' "
            "--hicache-storage-backend-extra-config '<redacted>' '--ssl-keyfile-password=<redacted>' "
            """--json-model-override-args '{"api_key": "<redacted>", "hidden_size": 8}' """
            "--watermark-config '<redacted>' --max-total-tokens 7",
        ),
        ("loadtest.experiments.commits", ["x", "OUT.json", "--api-key"], None),
        (None, ["/usr/local/bin/lt-sglang", "bench"], "lt-sglang bench"),
    ],
    ids=["module", "secrets", "experiment", "script"],
)
def test_a_result_names_its_command(
    main: str | None, argv: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if main is None else SimpleNamespace(name=main)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", argv)
    assert "s3cret" not in command_line()
    assert command_line() == (expected or f"python -m {main} OUT.json --api-key")
    assert stamp("a")["command"] == command_line()
