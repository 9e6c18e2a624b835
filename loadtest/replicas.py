"""A scenario on several replicas behind SGLang's model gateway, stock against ours, on this machine's GPUs.

    python loadtest/replicas.py loadtest/scenarios/tp8/5-qwq.yaml --replicas 4 --date 2026-11-22 [FLAGS]

FLAGS are SGLang's. Each replica has GPUs of its own (on a CPU they share the cores); with ``load.fill`` there
are as many clients as all of them hold. Writes one result file. Needs sglang-router: here, or ``--gateway``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lt_sglang.bench.bounds import Bounds
from lt_sglang.bench.decode_log import steady_of, together
from lt_sglang.bench.fill import filled
from lt_sglang.bench.machine import gpu_memory_mib, this_machine, wait_for_gpu_memory
from lt_sglang.bench.rehearsal import rehearsal
from lt_sglang.bench.result_file import Measured, build, measured, write
from lt_sglang.bench.runner import run_scenario
from lt_sglang.bench.scenario import Scenario
from lt_sglang.bench.scenario_file import load_scenarios, pick
from lt_sglang.bench.servers import LIGHTTRANSFER, specs_of
from lt_sglang.cli.parser import Parser, positive, positive_float
from lt_sglang.cli.run_options import add_run_options
from lt_sglang.launch.cpu import has_gpu
from lt_sglang.launch.engine import Engine, EngineSpec
from lt_sglang.launch.processes import free_port
from lt_sglang.launch.server_process import ServerProcess

READY_SECONDS = 120.0


class Gateway(ServerProcess):
    """SGLang's model gateway."""

    def ready(self) -> bool:
        """Whether it has workers."""
        try:
            return requests.get(f"{self.url}/readiness", timeout=2).status_code == 200
        except requests.RequestException:
            return False


@contextmanager
def gateway(urls: Sequence[str], log: Path, folder: Path | None) -> Iterator[str]:
    """SGLang's gateway in front of ``urls``, with the chart's arguments; its URL."""
    server = Gateway("the gateway", log)
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host=127.0.0.1"]
    command += [f"--port={server.port}"]
    command += [f"--prometheus-port={free_port()}", "--prometheus-host=127.0.0.1", "--policy=cache_aware"]
    command += ["--health-check-endpoint=/ready", "--worker-urls", *urls]
    server.start(command, {**os.environ, **({"PYTHONPATH": str(folder)} if folder else {})})
    try:
        server.wait_until_ready(READY_SECONDS)
        yield server.url
    finally:
        server.stop()


def replicas(spec: EngineSpec, count: int, work: Path, limit_s: float) -> list[Engine]:
    """Engines that import side by side, each with its GPUs; given up if not ready within ``limit_s``."""
    engines = []
    for number in range(count):
        gpus = range(number * spec.tp, (number + 1) * spec.tp)
        env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if has_gpu() else {}
        engines.append(Engine(spec, work / f"{spec.name}-{number}.log", env, limit_s))
        engines[-1].hold()
    return engines


def measure(
    scenario: Scenario, engines: Sequence[Engine], work: Path, folder: Path | None, limit_s: float
) -> Measured:
    """The scenario through a gateway in front of ``engines``, which are started and ended."""
    name = engines[0].spec.name
    with ExitStack() as stack:
        for engine in engines:
            engine.release()
        for engine in engines:
            stack.enter_context(engine)
        infos = [engine.info() for engine in engines]
        states = [state for info in infos for state in info["internal_states"]]
        if scenario.load.fill:
            scenario = filled(scenario, {"internal_states": states}, name)
            scenario = replace(scenario, load=replace(scenario.load, fill=False))
        url = stack.enter_context(
            gateway([engine.url for engine in engines], work / f"{name}-gateway.log", folder)
        )
        positions = [engine.log_position() for engine in engines]
        data = run_scenario(scenario, url, work / "runs" / name, limit_s)
        steady = [steady_of(one.log_since(at)) for one, at in zip(engines, positions, strict=True)]
        # Of the first replica: all are alike.
        return measured(data, engines[0].info()["internal_states"][0], together(steady))


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--case")
    parser.add_argument("--replicas", type=positive, default=4)
    parser.add_argument(
        "--baseline", help="stock's attention backend; default flashinfer, on a CPU torch_native"
    )
    parser.add_argument("--gateway", type=Path, help="a folder that holds sglang-router")
    parser.add_argument(
        "--limit-s",
        type=positive_float,
        default=3600.0,
        help="give up servers that are not ready, and a scenario that is not done, after so many seconds",
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny, and without a result file")
    add_run_options(parser)
    args, flags = parser.parse_known_args()
    scenario = pick(load_scenarios(args.scenario), args.case)
    if args.rehearse:
        scenario = rehearsal(scenario)
    backend = args.baseline or ("flashinfer" if has_gpu() else "torch_native")
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    specs = specs_of(scenario, work, (backend,), args.model_path, args.tp_size, tuple(flags))
    sides = {"baseline": specs[backend], "lighttransfer": specs[LIGHTTRANSFER]}
    machine, idle = this_machine(), gpu_memory_mib()
    runs: dict[str, list[Measured]] = {}
    engines: dict[str, list[Engine]] = {}
    try:
        for side in sides:
            # With GPUs both sides import at once; the second takes them when the first has ended.
            importing = sides if has_gpu() else [side]
            for name in importing:
                if name not in engines:
                    engines[name] = replicas(sides[name], args.replicas, work, args.limit_s)
            wait_for_gpu_memory(idle)
            runs[side] = [measure(scenario, engines[side], work, args.gateway, args.limit_s)]
            print(f"{side}: {_shown(runs[side][0].summary)}", flush=True)
        if not args.rehearse:
            # Before the engines end: that takes a while, and a command that is cut off then has its file.
            result = build(
                scenario, machine, sides, runs, Bounds({}, "No bound: several replicas."), args.note
            )
            result["scenario"] += f"-tp{specs[LIGHTTRANSFER].tp}-{args.replicas}-replicas"
            result["notes"].insert(
                0, f"{args.replicas} replicas behind the gateway; figures are of all together."
            )
            print(write(result, args.out, args.date, machine.label))
    finally:
        for engine in chain.from_iterable(engines.values()):
            engine.stop()


def _shown(summary: Mapping[str, float | None]) -> str:
    names = ("completed", "errors", "output_throughput", "median_tpot_ms")
    return ", ".join(f"{name} {summary[name]:.4g}" for name in names if summary[name] is not None)


if __name__ == "__main__":
    main()
