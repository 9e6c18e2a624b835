"""One result file: a scenario on stock SGLang and on ours, with repeats, spread, ratios and bounds.

The keys are those of every file in loadtest/results; loadtest/make_results.py makes its tables from them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lt_sglang.bench.bounds import Bounds
from lt_sglang.bench.decode_log import Steady
from lt_sglang.bench.machine import Machine, gpu_memory_mib, stamp
from lt_sglang.bench.scenario import Scenario
from lt_sglang.bench.scenario_file import as_mapping
from lt_sglang.bench.servers import SHAPE_FLAGS
from lt_sglang.launch.engine import EngineSpec

# Figures of the client a comparison shows; rates and times are left out on a CPU.
COUNTS = ("completed", "errors", "aborted", "total_input_tokens", "total_output_tokens", "cached_tokens")
RATES = (
    *("output_throughput", "input_throughput", "request_throughput", "request_goodput"),
    *("median_ttft_ms", "p90_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p90_tpot_ms", "p99_tpot_ms"),
    *("median_e2e_latency_ms", "p90_e2e_latency_ms", "p99_e2e_latency_ms"),
)
HIGHER_IS_BETTER = ("requests_running", "decode_tokens_per_second", "output_throughput")
FILL_NOTE = "Each server got as many requests as its KV memory holds, all at once."
CPU_NOTE = (
    "CPU: absolute times and rates are left out, and ratios of speed compare two plain-torch backends: they "
    "are not the gain of lazy layers."
)


@dataclass(frozen=True)
class Measured:
    """One run of a scenario on one server.

    summary: the client's figures. steady: from the server's log, None if it never decoded steadily.
    memory: what /server_info and nvidia-smi say of it. config: /server_info's lighttransfer. retractions: as
    the server counted them. phases: tokens/s by the traffic of a load's phases. choices: how layers were
    chosen, as metrics_page.choices has it.
    """

    summary: Mapping[str, float | None]
    steady: Steady | None
    memory: Mapping[str, Any]
    config: Mapping[str, Any] | None
    gates: Sequence[Mapping[str, Any]]
    retractions: int | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)

    def figure(self, name: str) -> float | None:
        """A figure by the name result files use."""
        if name == "requests_running":
            return self.steady.running if self.steady else None
        if name == "decode_tokens_per_second":
            return self.steady.throughput if self.steady else None
        if name == "prefill_speed":
            ttft = self.summary["median_ttft_ms"]
            return 1 / ttft if ttft else None
        return self.summary[name]


def measured(data: Mapping[str, Any], state: Mapping[str, Any], steady: Steady | None) -> Measured:
    """A run from the client's summary.json and the server's state, right after it.

    state: one of the ``internal_states`` of /server_info.
    """
    memory: dict[str, Any] = {"server": state.get("memory_usage")}
    used = gpu_memory_mib()
    if used:
        memory["gpu_used_mib"] = used
    counted = (data.get("server") or {}).get("retractions")
    retractions = None if counted is None else int(counted)
    return Measured(
        data["summary"],
        steady,
        memory,
        state.get("lighttransfer"),
        data["gates"],
        retractions,
        data.get("phases") or {},
        data.get("choices") or {},
    )


def build(
    scenario: Scenario,
    machine: Machine,
    specs: Mapping[str, EngineSpec],
    runs: Mapping[str, Sequence[Measured]],
    limits: Bounds,
    notes: Sequence[str],
) -> dict[str, Any]:
    """The content of a result file; ``specs`` and ``runs`` by side, baseline first or missing."""
    on_cpu = not machine.gpus
    ours = runs["lighttransfer"]
    result = header(scenario, machine, specs["lighttransfer"])
    for side, some in runs.items():
        result[side] = {"engine": specs[side].name, **_side(some, on_cpu)}
    remarks = [*notes, *([FILL_NOTE] if scenario.load.fill else [])]
    if "baseline" in runs:
        if specs["baseline"].model != specs["lighttransfer"].model:
            remarks.append(
                f"The baseline's model is {Path(specs['baseline'].model).name}, of the same sizes."
            )
        ratio, spread = ratios(runs["baseline"], ours, _compared(scenario))
        result["ratio"], result["ratio_spread"] = ratio, spread
        result["bound"] = {name: round(value, 4) for name, value in limits.ratios.items()}
        result["measured_over_bound"] = {
            name: round(ratio[name] / value, 4) for name, value in limits.ratios.items() if name in ratio
        }
        remarks.append(limits.remark)
    result["gates"] = [dict(gate) for gate in ours[-1].gates]
    result["notes"] = [*remarks, *([CPU_NOTE] if on_cpu else [])]
    return result


def header(scenario: Scenario, machine: Machine, spec: EngineSpec) -> dict[str, Any]:
    """What every result file begins with: what was sent to what, on what."""
    return {
        **stamp(scenario.name, machine, scenario.seed),
        "workload": {"model": _model(spec), **_workload(scenario)},
    }


def ratios(
    base: Sequence[Measured], ours: Sequence[Measured], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Ours over the baseline, above 1 being better: of the medians, and the range over pairs of runs."""
    found: dict[str, float] = {}
    spread: dict[str, list[float]] = {}
    for name in names:
        sides = [[one.figure(name) for one in side] for side in (base, ours)]
        known = [[value for value in side if value] for side in sides]
        if not all(known):
            continue
        found[name] = round(statistics.median(known[1]) / statistics.median(known[0]), 4)
        pairs = [b / a for a, b in zip(*sides, strict=False) if a and b]
        spread[name] = [round(min(pairs), 4), round(max(pairs), 4)] if pairs else []
    return found, spread


def write(result: Mapping[str, Any], folder: Path, date: str, label: str) -> Path:
    """DATE-LABEL-SCENARIO.json in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date}-{label}-{result['scenario']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _compared(scenario: Scenario) -> tuple[str, ...]:
    # A scenario of single tokens measures prefill.
    outputs = [kind.output for kind in scenario.traffic]
    single = all(output is not None and output.high == 1 for output in outputs)
    return ("prefill_speed",) if single else HIGHER_IS_BETTER


def _side(runs: Sequence[Measured], on_cpu: bool) -> dict[str, Any]:
    last = runs[-1]
    side: dict[str, Any] = {"runs": len(runs), "memory": dict(last.memory)}
    if last.config is not None:
        side["config"] = dict(last.config)
    side |= {name: last.summary[name] for name in COUNTS}
    # Of all runs: an error in any of them is to be seen.
    side["errors"] = sum(int(one.summary["errors"] or 0) for one in runs)
    if all(one.retractions is not None for one in runs):
        side["retractions"] = max(one.retractions or 0 for one in runs)
    steady = [one.steady for one in runs if one.steady]
    if steady:
        side["requests_running"] = round(statistics.median(one.running for one in steady))
    if "lazy_requests" in last.choices:
        side["lazy_requests"] = dict(last.choices["lazy_requests"])
    if on_cpu:
        return side
    if steady:
        side["decode_tokens_per_second"] = statistics.median(one.throughput for one in steady)
        side["spread"] = [min(one.low for one in steady), max(one.high for one in steady)]
        side["log_intervals"] = sum(one.intervals for one in steady)
    if last.phases:
        side["phases"] = {name: _median(one.phases.get(name) for one in runs) for name in last.phases}
    side["end_to_end_seconds"] = _median(one.summary["duration"] for one in runs)
    for name in RATES:
        side[name] = _median(one.summary[name] for one in runs)
    side["each_run"] = [
        {name: one.summary[name] for name in ("duration", *RATES)}
        | {"retractions": one.retractions}
        | ({"phases": dict(one.phases)} if one.phases else {})
        | ({"steady": asdict(one.steady)} if one.steady else {})
        | {name: value for name, value in one.choices.items() if name == "identification_seconds"}
        for one in runs
    ]
    return side


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 4) if known else None


def _model(spec: EngineSpec) -> str:
    dummy = " shape, dummy weights" if set(SHAPE_FLAGS) <= set(spec.flags) else ""
    return f"{Path(spec.model).name}{dummy}, tp {spec.tp}"


def _workload(scenario: Scenario) -> dict[str, Any]:
    """What was sent."""
    data = as_mapping(scenario)
    return {name: data[name] for name in ("about", "api", "load", "traffic", "aborts", "slo", "engine")}
