"""Compare stock SGLang with ours: the same GPUs, the same flags, the same traffic, one after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from lt_sglang.cli.model_config import read_model_config
from lt_sglang.cli.options import resolve_config, take_options
from lt_sglang.config import CONFIG_KEY
from lt_sglang.errors import LightTransferError
from lt_sglang.loadtest.bounds import Bounds, bounds
from lt_sglang.loadtest.engines import LIGHTTRANSFER, Engine, EngineSpec
from lt_sglang.loadtest.machine import Machine, gpu_memory_mib
from lt_sglang.loadtest.result_file import Measured, build, write
from lt_sglang.loadtest.runner import run_scenario
from lt_sglang.loadtest.scenario import Scenario
from lt_sglang.loadtest.servers import specs_of
from lt_sglang.planner.shapes import shape_from_config

# Below this an engine is not worth starting.
LEAST_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """How to compare.

    model: a folder or hub name, in place of a scenario's shape. flags: SGLang's, for both sides. options:
    ``--lt-*``. most_tp: GPUs, where a scenario asks for more. baselines: attention backends of stock SGLang,
    one comparison each. rounds: starts of each server; their order alternates. repeats: runs of a scenario
    within a start. work: folder for logs and reports. out: folder for result files. budget_s: stop starting
    things after so long.
    """

    work: Path
    out: Path
    date: str
    machine: Machine
    model: str | None = None
    most_tp: int | None = None
    flags: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ("flashinfer",)
    rounds: int = 2
    repeats: int = 1
    budget_s: float | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Cell:
    """One scenario, the servers it runs on, and what was measured on each."""

    scenario: Scenario
    specs: dict[str, EngineSpec]
    runs: dict[str, list[Measured]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Bench:
    """Runs cells and writes a result file for each comparison that is complete."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._end = time.monotonic() + (settings.budget_s or float("inf"))
        self._starts = 0
        self._info: dict[str, dict[str, Any]] = {}
        settings.work.mkdir(parents=True, exist_ok=True)

    def run(self, scenarios: Sequence[Scenario]) -> int:
        """Measure every scenario and write the result files.

        Returns 1 if a scenario has no result file, or one of its gates was broken on ours; else 0.
        """
        cells = [self._cell(scenario) for scenario in scenarios]
        # Each server is started once a round for all scenarios that need it; where time may run out,
        # scenarios are finished one by one.
        groups = [cells] if self._settings.budget_s is None else [[cell] for cell in cells]
        paths: dict[str, list[Path]] = {}
        for group in groups:
            specs = {spec.key: spec for cell in group for spec in cell.specs.values()}
            for number in range(self._settings.rounds):
                order = list(specs.values())
                for spec in order if number % 2 == 0 else reversed(order):
                    self._run_engine(spec, group, number)
                    paths |= {cell.scenario.name: self._write(cell) for cell in group}
        for name, some in paths.items():
            print(f"{name}: {', '.join(map(str, some)) or 'no result'}")
        broken = [
            gate
            for cell in cells
            for one in cell.runs.get(LIGHTTRANSFER, ())
            for gate in one.gates
            if not gate["passed"]
        ]
        return int(bool(broken) or not all(paths.values()))

    def _cell(self, scenario: Scenario) -> Cell:
        given = self._settings
        return Cell(
            scenario,
            specs_of(
                scenario, given.work, given.baselines, given.model, given.most_tp, given.flags, given.options
            ),
        )

    def _run_engine(self, spec: EngineSpec, cells: Sequence[Cell], number: int) -> None:
        mine = [(cell, side) for cell in cells for side, one in cell.specs.items() if one.key == spec.key]
        if self._left() < LEAST_SECONDS:
            for cell, side in mine:
                self._problem(cell, f"round {number + 1} of {side} was skipped: the time was up")
            return
        self._starts += 1
        log = self._settings.work.absolute() / f"{self._starts:02d}-{spec.name}.log"
        print(f"{spec.name}: starting, log {log}", flush=True)
        left = list(mine)
        try:
            with Engine(spec, log) as engine:
                self._info[spec.key] = engine.info()
                for cell, side in mine:
                    for repeat in range(self._settings.repeats):
                        self._run_cell(engine, cell, side, f"{number + 1}-{repeat + 1}")
                    left.remove((cell, side))
        except (LightTransferError, requests.RequestException) as error:
            # One server that does not start, or ends, must not cost the others their results.
            for cell, side in left:
                self._problem(cell, f"{side}: {error}")

    def _run_cell(self, engine: Engine, cell: Cell, side: str, number: str) -> None:
        scenario, left = cell.scenario, self._left()
        if left <= 0:
            self._problem(cell, f"run {number} on {side} was skipped: the time was up")
            return
        engine.flush()
        position = engine.log_position()
        out = self._settings.work / "runs" / f"{scenario.name}-{side}-{number}"
        try:
            data = run_scenario(scenario, engine.url, out, None if left == float("inf") else left)
        except LightTransferError as error:
            self._problem(cell, str(error))
            return
        state = engine.info()["internal_states"][0]
        memory = {"server": state.get("memory_usage")}
        used = gpu_memory_mib()
        if used:
            memory["gpu_used_mib"] = used
        one = Measured(
            summary=data["summary"],
            steady=engine.steady_since(position),
            memory=memory,
            config=state.get("lighttransfer"),
            gates=data["gates"],
        )
        cell.runs.setdefault(side, []).append(one)
        shown = f", {one.steady.running} running, {one.steady.throughput:.0f} tok/s" if one.steady else ""
        print(
            f"{scenario.name} on {side}: {one.summary['completed']} answered, "
            f"{one.summary['errors']} errors, {one.summary['output_throughput']:.1f} tok/s in all{shown}",
            flush=True,
        )

    def _write(self, cell: Cell) -> list[Path]:
        if LIGHTTRANSFER not in cell.runs:
            return []
        baselines = [side for side in cell.runs if side != LIGHTTRANSFER]
        if cell.scenario.engine.sides == "both" and not baselines:
            return []
        if not baselines:
            return [self._write_one(cell, None)]
        return [self._write_one(cell, backend) for backend in baselines]

    def _write_one(self, cell: Cell, backend: str | None) -> Path:
        settings = self._settings
        sides = {} if backend is None else {"baseline": backend}
        sides["lighttransfer"] = LIGHTTRANSFER
        result = build(
            cell.scenario,
            settings.machine,
            {name: cell.specs[side] for name, side in sides.items()},
            {name: cell.runs[side] for name, side in sides.items()},
            Bounds({}, "") if backend is None else self._bounds(cell, backend),
            (*settings.notes, *cell.problems),
        )
        if backend not in (None, settings.baselines[0]):
            result["scenario"] += f"-vs-{backend}"
        return write(result, settings.out, settings.date, settings.machine.label)

    def _bounds(self, cell: Cell, backend: str) -> Bounds:
        spec, ours = cell.specs[backend], cell.specs[LIGHTTRANSFER]
        server = self._info[spec.key]
        capacity = (server["internal_states"][0].get("memory_usage") or {}).get("token_capacity")
        model_config = read_model_config(spec.model)
        if not capacity or model_config is None:
            return Bounds({}, "No bound: the model's shape or the server's KV memory is not known.")
        overrides = {CONFIG_KEY: dict(ours.lighttransfer)} if ours.lighttransfer else {}
        options, _ = take_options(list(ours.options))
        config = resolve_config(options, spec.model, model_config, overrides)
        assert config is not None
        shape = shape_from_config(model_config, Path(spec.model).name)
        gpu = self._settings.machine.planned_gpu
        return bounds(cell.scenario, shape, config, spec.tp, gpu, int(capacity), server)

    def _problem(self, cell: Cell, text: str) -> None:
        # Ends of logs are long; where the log is comes first.
        line = " ".join(text.split())[:400]
        cell.problems.append(line)
        print(f"{cell.scenario.name}: {line}", flush=True)

    def _left(self) -> float:
        return self._end - time.monotonic()
