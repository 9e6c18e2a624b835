"""Compare stock SGLang with ours: the same GPUs, the same flags, the same traffic, one after the other."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import requests

from lt_sglang.bench.bounds import Bounds, bounds
from lt_sglang.bench.capacity import check_fits, kv_tokens
from lt_sglang.bench.decode_log import steady_of
from lt_sglang.bench.machine import Machine, gpu_memory_mib, wait_for_gpu_memory
from lt_sglang.bench.result_file import Measured, build, measured, write
from lt_sglang.bench.runner import run_scenario
from lt_sglang.bench.scenario import Scenario
from lt_sglang.bench.scenario_file import as_mapping
from lt_sglang.bench.servers import LIGHTTRANSFER, specs_of
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.engine import Engine, EngineSpec
from lt_sglang.launch.model_config import read_model_config
from lt_sglang.launch.processes import free_port
from lt_sglang.planner.shapes import shape_from_config

# Below this an engine is not worth starting.
LEAST_SECONDS = 60.0
LIMIT_SECONDS = 3600.0
# What of a scenario two servers must share to be compared.
WORK = ("api", "load", "traffic", "seed", "aborts", "slo", "gates")


@dataclass(frozen=True)
class Settings:
    """How to compare.

    model: a folder or hub name, in place of a scenario's shape. flags: SGLang's, for both sides. options:
    ``--lt-*``. most_tp: GPUs, where a scenario asks for more. baselines: attention backends of stock SGLang,
    one comparison each. rounds: starts of each server; their order alternates. repeats: runs of a scenario
    within a start, each with another seed. work: folder for logs and reports. out: folder for result files.
    budget_s: stop starting things after so long. limit_s: give up a server that is not ready, and a scenario
    that is not done, within so long. overlap: let the next server import while one starts and is measured.
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
    limit_s: float = LIMIT_SECONDS
    overlap: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One scenario and the servers it runs on, by side."""

    scenario: Scenario
    specs: dict[str, EngineSpec]

    @property
    def work(self) -> str:
        """The traffic and its limits; equal for scenarios that differ only in their engines."""
        data = as_mapping(self.scenario)
        return json.dumps([data[name] for name in WORK], sort_keys=True)


@dataclass(frozen=True)
class Start:
    """One start of a server in round ``number``, and one cell of each work that it does."""

    spec: EngineSpec
    number: int
    cells: tuple[Cell, ...]


# A server and a work: what is measured once, for every cell that wants it.
Key = tuple[EngineSpec, str]


def plan(groups: Sequence[Sequence[Cell]], rounds: int) -> list[Start]:
    """Starts in order. In a group each server is started once a round; a group reuses what others measure."""
    starts, planned = [], set()
    for cells in groups:
        specs = {spec: spec for cell in cells for spec in cell.specs.values()}
        for number in range(rounds):
            order = list(specs.values())
            for spec in order if number % 2 == 0 else reversed(order):
                wanted = {
                    cell.work: cell
                    for cell in reversed(cells)
                    if _wants(cell, spec) and (spec, cell.work, number) not in planned
                }
                planned |= {(spec, work, number) for work in wanted}
                if wanted:
                    starts.append(Start(spec, number, tuple(reversed(wanted.values()))))
    return starts


class Bench:
    """Runs scenarios and writes a result file for each comparison that is complete."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._end = time.monotonic() + (settings.budget_s or float("inf"))
        self._engines = 0
        self._info: dict[EngineSpec, dict[str, Any]] = {}
        self._runs: dict[Key, list[Measured]] = {}
        self._problems: dict[Key, list[str]] = {}
        settings.work.mkdir(parents=True, exist_ok=True)

    def commands(self, groups: Sequence[Sequence[Scenario]]) -> dict[str, list[str]]:
        """By name, the command line of each server that the scenarios need."""
        commands: dict[str, list[str]] = {}
        seen = set()
        for scenario in (scenario for group in groups for scenario in group):
            for spec in self._cell(scenario).specs.values():
                if spec not in seen:
                    seen.add(spec)
                    commands[f"{scenario.name}: {spec.name}"], _ = spec.command(free_port())
        return commands

    def run(self, groups: Sequence[Sequence[Scenario]]) -> int:
        """Measure the scenarios, one group after the other, and write the result files.

        Returns 1 if a scenario has no result file, or one of its gates was broken on ours; else 0.
        """
        grouped = [[self._cell(scenario) for scenario in group] for group in groups]
        cells = [cell for group in grouped for cell in group]
        self._run_starts(plan(grouped, self._settings.rounds), cells)
        files = {cell.scenario.name: self._write(cell) for cell in cells}
        for name, paths in files.items():
            print("\n".join(map(told, paths)) or f"{name}: no result")
        return int(not all(files.values()) or any(map(self._broke_a_gate, cells)))

    def _run_starts(self, starts: Sequence[Start], cells: Sequence[Cell]) -> None:
        idle_mib = gpu_memory_mib()
        waiting: Engine | None = None
        try:
            for start, following in zip_longest(starts, starts[1:]):
                engine = waiting or self._engine(start)
                waiting = None
                if self._left() < LEAST_SECONDS:
                    engine.stop()
                    for cell in start.cells:
                        self._problem(start.spec, cell, "was skipped: the time was up")
                    continue
                if self._settings.overlap and following is not None:
                    waiting = self._engine(following)
                    waiting.hold()
                wait_for_gpu_memory(idle_mib)
                self._run_engine(engine, start, cells)
        finally:
            if waiting is not None:
                waiting.stop()

    def _broke_a_gate(self, cell: Cell) -> bool:
        runs = self._runs.get(_key(cell, LIGHTTRANSFER), ())
        return any(not gate["passed"] for one in runs for gate in one.gates)

    def _cell(self, scenario: Scenario) -> Cell:
        options = self._settings
        specs = specs_of(
            scenario,
            options.work,
            options.baselines,
            options.model,
            options.most_tp,
            options.flags,
            options.options,
        )
        return Cell(scenario, specs)

    def _engine(self, start: Start) -> Engine:
        self._engines += 1
        log = self._settings.work.absolute() / f"{self._engines:02d}-{start.spec.name}.log"
        return Engine(start.spec, log, start_seconds=self._settings.limit_s)

    def _run_engine(self, engine: Engine, start: Start, cells: Sequence[Cell]) -> None:
        spec, unfinished = start.spec, list(start.cells)
        try:
            with engine:
                self._info[spec] = engine.info()
                for cell in start.cells:
                    for repeat in range(self._settings.repeats):
                        self._run_cell(engine, cell, start.number, repeat)
                    unfinished.remove(cell)
                    # A run that is cut off keeps what it has.
                    for other in cells:
                        if other.work == cell.work and _wants(other, spec):
                            self._write(other)
        except (LightTransferError, requests.RequestException) as error:
            # One server that does not start, or ends, must not cost the others their results.
            for cell in unfinished:
                self._problem(spec, cell, str(error))

    def _run_cell(self, engine: Engine, cell: Cell, number: int, repeat: int) -> None:
        # Other text each repeat: nothing that was cached, or compiled for a prompt, helps the next.
        scenario = replace(cell.scenario, seed=cell.scenario.seed + repeat)
        try:
            run = self._measure(engine, scenario, f"{number + 1}-{repeat + 1}")
        except LightTransferError as error:
            self._problem(engine.spec, cell, str(error))
            return
        self._runs.setdefault((engine.spec, cell.work), []).append(run)
        print(f"{cell.scenario.name} on {engine.spec.name}: {_shown(run)}", flush=True)

    def _measure(self, engine: Engine, scenario: Scenario, number: str) -> Measured:
        limit_s = min(self._left(), self._settings.limit_s)
        if limit_s <= 0:
            raise LightTransferError(f"run {number} was skipped: the time was up")
        name = engine.spec.name
        check_fits(scenario, self._info[engine.spec], name)
        engine.flush()
        position = engine.log_position()
        out = self._settings.work / "runs" / f"{scenario.name}-{name}-{number}"
        data = run_scenario(scenario, engine.url, out, limit_s, engine.admin_key)
        return measured(data, engine.info()["internal_states"][0], steady_of(engine.log_since(position)))

    def _write(self, cell: Cell) -> list[Path]:
        sides = [side for side in cell.specs if self._runs.get(_key(cell, side))]
        if LIGHTTRANSFER not in sides:
            return []
        baselines: list[str | None] = [side for side in sides if side != LIGHTTRANSFER]
        if cell.scenario.engine.sides == "both" and not baselines:
            return []
        return [self._write_one(cell, backend) for backend in baselines or [None]]

    def _write_one(self, cell: Cell, backend: str | None) -> Path:
        settings = self._settings
        sides = {} if backend is None else {"baseline": backend}
        sides["lighttransfer"] = LIGHTTRANSFER
        result = build(
            cell.scenario,
            settings.machine,
            {name: cell.specs[side] for name, side in sides.items()},
            {name: self._runs[_key(cell, side)] for name, side in sides.items()},
            Bounds({}, "") if backend is None else self._bounds(cell, backend),
            (
                *settings.notes,
                *(line for side in sides.values() for line in self._problems.get(_key(cell, side), ())),
            ),
        )
        if backend not in (None, settings.baselines[0]):
            result["scenario"] += f"-vs-{backend}"
        return write(result, settings.out, settings.date, settings.machine.label)

    def _bounds(self, cell: Cell, backend: str) -> Bounds:
        spec, ours = cell.specs[backend], cell.specs[LIGHTTRANSFER]
        server = self._info[spec]
        capacity = kv_tokens(server["internal_states"][0])
        model_config = read_model_config(spec.model)
        if not capacity or model_config is None:
            return Bounds({}, "No bound: the model's shape or the server's KV memory is not known.")
        config = ours.config()
        assert config is not None
        shape = shape_from_config(model_config, Path(spec.model).name)
        gpu = self._settings.machine.planned_gpu
        own = self._info[ours].get("kv_cache_dtype")
        return bounds(cell.scenario, shape, config, spec.tp, gpu, capacity, server, own)

    def _problem(self, spec: EngineSpec, cell: Cell, text: str) -> None:
        # Ends of logs are long.
        line = f"{spec.name}: {' '.join(text.split())[:400]}"
        self._problems.setdefault((spec, cell.work), []).append(line)
        print(f"{cell.scenario.name}: {line}", flush=True)

    def _left(self) -> float:
        return self._end - time.monotonic()


def told(path: Path) -> str:
    """A result file's ratios, and where it is."""
    found = json.loads(path.read_text(encoding="utf-8"))
    ratios = [f"{value:.2f}x {name.replace('_', ' ')}" for name, value in found.get("ratio", {}).items()]
    against = f" against {found['baseline']['engine']}" if ratios else ""
    return f"{found['scenario']}: {', '.join(ratios) or 'no ratio'}{against} ({path})"


def _shown(run: Measured) -> str:
    summary, steady = run.summary, run.steady
    decode = f", {steady.running} running, {steady.throughput:.0f} tok/s" if steady else ""
    return (
        f"{summary['completed']} answered, {summary['errors']} errors, "
        f"{summary['output_throughput']:.1f} tok/s in {summary['duration']:.0f} s{decode}"
    )


def _wants(cell: Cell, spec: EngineSpec) -> bool:
    return any(one == spec for one in cell.specs.values())


def _key(cell: Cell, side: str) -> Key:
    return cell.specs[side], cell.work
