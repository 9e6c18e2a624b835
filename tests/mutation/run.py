"""Do the tests notice small faults? Plants a seeded sample of them one at a time, and runs the tests on each.

    make mutation [ARGS="--sample 400 --seed 1 --minutes 15"]

Imports SGLang and the tests once and forks for every fault, so that it costs its tests only. With --minutes
it stops early, and the next call goes on; results so far are in .mutation/, the score of a finished run in
tests/mutation/score.json. Faults that change nothing anybody can observe are listed, with the reason, in
tests/mutation/equivalent.json. Also tried are the faults of by_hand.json, which once passed all unit tests.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import inspect
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from tests.mutation.mutants import Mutant, sample

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
STATE = ROOT / ".mutation"

MODULES = [
    "lt_sglang/memory/*.py",
    "lt_sglang/layers/*.py",
    "lt_sglang/cache/*.py",
    *(f"lt_sglang/identify/{name}.py" for name in ("observation_window", "queue", "state")),
    "lt_sglang/attention/indices.py",
    "lt_sglang/hooks/queue_watch.py",
    "lt_sglang/model_runner.py",
]
NOT_COVERED = {
    "lt_sglang/attention/kernels/*.py, identify/queue_kernel.py, identify/scores/*kernel*.py": (
        "Triton kernels; they run under its interpreter in tests/unit/interpreted_*.py, minutes for each"
    ),
    "lt_sglang/attention/*flashinfer*.py, *_plan*.py, *decode.py, prefix.py, gathered.py": "need a GPU",
    "lt_sglang/attention/*torch*.py, identify/selector.py, identify/collect.py": (
        "attention and scores; compared with transformers on real engines in tests/engine"
    ),
}
CACHES = ["unit/test_radix.py", "unit/test_dynamic_radix.py", "property/test_caches.py"]
TESTS = {
    "memory/sinks.py": ["unit/test_sinks.py", "unit/test_sinks_churn.py", *CACHES],
    "memory/kv_keys.py": ["unit/test_radix_keys.py"],
    "memory/units.py": ["unit/test_units.py", "unit/test_allocator.py"],
    "memory/demand.py": ["unit/test_demand.py", "unit/test_budget.py"],
    "memory/budget.py": ["unit/test_budget.py"],
    "memory/sizes.py": ["unit/test_sizes.py", "unit/test_planner.py"],
    "memory/allocator.py": ["unit/test_allocator.py", "unit/test_radix.py", "unit/test_windows_slide.py"],
    "memory/pools.py": ["unit/test_pools.py"],
    "memory/row_table.py": [
        "unit/test_device_tables.py",
        "unit/test_sinks.py",
        "unit/test_sinks_churn.py",
        "unit/test_dynamic_layer_sets.py",
    ],
    "layers/layer_sets.py": ["unit/test_dynamic_layer_sets.py", "unit/test_dynamic_prefill.py", *CACHES],
    "layers/prefix_index.py": ["unit/test_prefix_index.py"],
    "layers/prefill.py": [
        *("unit/test_dynamic_prefill.py", "unit/test_dynamic_radix_layers.py"),
        *(*CACHES, "unit/test_model_runner.py"),
    ],
    "layers/prefill_plans.py": ["unit/test_model_runner.py"],
    "memory/banks.py": ["unit/test_banks.py", "unit/test_pools.py"],
    "memory/flat_pool.py": ["unit/test_banks.py", "unit/test_pools.py"],
    "identify/observation_window.py": ["unit/test_dynamic_window.py", "unit/test_dynamic_state.py"],
    "hooks/queue_watch.py": ["unit/test_watch.py"],
    "cache/radix_static.py": ["unit/test_radix.py", "unit/test_radix_keys.py", *CACHES],
    "cache/radix_dynamic.py": ["unit/test_dynamic_radix.py", "unit/test_dynamic_radix_layers.py", *CACHES],
    "cache/factory.py": ["unit/test_radix.py"],
    "identify/queue.py": ["unit/test_queue.py"],
    "layers/async_host_copy.py": ["unit/test_device_tables.py", "unit/test_dynamic_layer_sets.py"],
    "identify/state.py": ["unit/test_dynamic_state.py", "unit/test_model_runner.py"],
    "attention/indices.py": ["unit/test_indices.py", "property/test_caches.py"],
    "model_runner.py": ["unit/test_model_runner.py"],
}
# What a fault may cost: a loop that never ends is noticed too.
CPU_SECONDS = 30
ENVIRONMENT = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "LT_STEPS": "1600",
    "LT_NO_SHRINK": "1",
    "LT_SEED": "20",
}


def tests_of(path: str) -> list[str]:
    """The tests that stand for a module, the quick ones first; of one that nobody entered, those of all."""
    name = path.removeprefix("lt_sglang/")
    extra = sorted(f"unit/{test.name}" for test in (ROOT / "tests/unit").glob(f"test*{Path(name).stem}*.py"))
    chosen = dict.fromkeys([*TESTS.get(name, extra + CACHES), *extra])
    return [f"tests/{test}" for test in chosen if (ROOT / "tests" / test).exists()]


def plant(mutant: Mutant) -> None:
    """Give the functions of the module, wherever they are known by now, the code of the faulty text."""
    module = importlib.import_module(mutant.path.removesuffix(".py").replace("/", "."))
    codes: dict[str, CodeType] = {}

    def collect(code: CodeType) -> None:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                codes[constant.co_qualname] = constant
                collect(constant)

    collect(compile(mutant.source, str(ROOT / mutant.path), "exec"))
    changed = 0
    for function in _functions(vars(module).values(), module.__name__):
        code = codes.get(function.__code__.co_qualname)
        if code is not None and code != function.__code__:
            function.__code__ = code
            changed += 1
    assert changed, f"{mutant.name} changes nothing"


def _functions(values: Iterable[Any], module: str) -> Iterator[FunctionType]:
    for value in values:
        if isinstance(value, property):
            value = value.fget
        value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
        if isinstance(value, FunctionType) and value.__module__ == module:
            yield value
        elif isinstance(value, type) and value.__module__ == module:
            yield from _functions(vars(value).values(), module)


def in_child(tests: list[str], mutant: Mutant | None, log: Path) -> str:
    """Run tests in a fork: "passed", "failed", "broken" (they could not even be collected) or "endless"."""
    gc.freeze()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return "endless" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM) else "crashed"
        return {0: "passed", 1: "failed"}.get(os.WEXITSTATUS(status), "broken")
    code = 70
    try:
        gc.disable()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        signal.alarm(8 * CPU_SECONDS)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        if mutant is not None:
            plant(mutant)
        import pytest

        code = int(
            pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--tb=line", *tests])
        )
    except BaseException as error:
        print(repr(error))
    finally:
        os._exit(code)


def warm_up(tests: list[str]) -> None:
    """Import the tests and all they import, so that forks find it there."""
    import pytest

    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", *tests])


def by_hand() -> dict[str, str]:
    """What the unit tests alone say to the faults of by_hand.json, which once passed them."""
    outcomes = {}
    for fault in json.loads((HERE / "by_hand.json").read_text(encoding="utf-8")):
        text = (ROOT / fault["path"]).read_text(encoding="utf-8")
        assert text.count(fault["before"]) == 1, f"{fault['path']} has not once: {fault['before']}"
        source = text.replace(fault["before"], fault["after"])
        mutant = Mutant(fault["path"], 0, "", "by hand", fault["before"], fault["after"], source)
        tests = [test for test in tests_of(fault["path"]) if "/unit/" in test]
        outcomes[fault["what"]] = in_child(tests, mutant, STATE / "last.log")
        print(f"{fault['what']}: the unit tests {outcomes[fault['what']]}", flush=True)
    return outcomes


def command(*given: str) -> str:
    """What git says."""
    return subprocess.run(
        ["git", *given], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def score(
    drawn: list[Mutant], total: int, results: dict[str, str], seed: int, seconds: float
) -> dict[str, Any]:
    """The result file."""
    reasons: dict[str, str] = json.loads((HERE / "equivalent.json").read_text(encoding="utf-8"))
    survived = [mutant for mutant in drawn if results[mutant.name] == "passed"]
    equivalent = [mutant for mutant in survived if mutant.name in reasons]
    killed = len(drawn) - len(survived)
    by_module = Counter(mutant.path for mutant in drawn)
    lost = Counter(mutant.path for mutant in survived)
    return {
        "killed": killed,
        "sample": len(drawn),
        "score": round(killed / len(drawn), 4),
        "equivalent": len(equivalent),
        "score_without_equivalent": round(killed / (len(drawn) - len(equivalent)), 4),
        "mutants": total,
        "seed": seed,
        "commit": command("rev-parse", "HEAD"),
        "changed": command("status", "--porcelain", "lt_sglang", "tests").splitlines(),
        "versions": {name: version(name) for name in ("sglang", "torch", "mutmut", "hypothesis", "pytest")},
        "python": sys.version.split()[0],
        "minutes": round(seconds / 60, 1),
        "by_hand": by_hand(),
        "outcomes": dict(Counter(results[mutant.name] for mutant in drawn)),
        "by_module": {path: f"{count - lost[path]} of {count}" for path, count in sorted(by_module.items())},
        "survivors": [
            {
                "name": mutant.name,
                "where": f"{mutant.path}:{mutant.line} {mutant.function}",
                "before": mutant.before,
                "after": mutant.after,
                "equivalent": reasons.get(mutant.name),
            }
            for mutant in survived
        ],
        "not_covered": NOT_COVERED,
    }


def main(arguments: list[str]) -> int:
    """Returns 1 if tests fail without any fault, 2 while the sample is not finished."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="stop after so long; the next call goes on"
    )
    parser.add_argument("--only", help="part of a module's path, for a look at one module; writes no score")
    parser.add_argument("--by-hand", action="store_true", help="only the faults of by_hand.json")
    parser.add_argument("--again", action="store_true", help="run what survived in earlier calls once more")
    given = parser.parse_args(arguments)
    os.chdir(ROOT)
    os.environ.update(ENVIRONMENT)
    paths = sorted({str(path.relative_to(ROOT)) for pattern in MODULES for path in ROOT.glob(pattern)})
    drawn, total = sample(ROOT, paths, given.sample, given.seed)
    if given.only:
        drawn = [mutant for mutant in drawn if given.only in mutant.path]
    STATE.mkdir(exist_ok=True)
    file = STATE / f"results-{given.seed}.json"
    saved: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"results": {}, "seconds": 0.0}
    results: dict[str, str] = saved["results"]
    if given.again:
        results = {name: outcome for name, outcome in results.items() if outcome != "passed"}
    tests = list(dict.fromkeys(test for path in paths for test in tests_of(path)))
    begin = time.monotonic()
    warm_up(tests)
    print(f"{total} mutants in {len(paths)} modules; {len(drawn)} sampled with seed {given.seed}")
    if (outcome := in_child(tests, None, STATE / "baseline.log")) != "passed":
        print(f"without any fault the tests {outcome}: {STATE / 'baseline.log'}")
        return 1
    print(f"without a fault the tests pass, {time.monotonic() - begin:.0f} s")
    if given.by_hand:
        return int(any(outcome == "passed" for outcome in by_hand().values()))
    for number, mutant in enumerate(drawn):
        if mutant.name in results:
            continue
        if time.monotonic() - begin > 60 * given.minutes:
            print(f"{len(drawn) - number} are left")
            return 2
        results[mutant.name] = in_child(tests_of(mutant.path), mutant, STATE / f"last-{os.getpid()}.log")
        seconds = saved["seconds"] + time.monotonic() - begin
        file.write_text(json.dumps({"results": results, "seconds": seconds}))
        if results[mutant.name] == "passed":
            print(f"survived {mutant.name} {mutant.path}:{mutant.line} {mutant.function}", flush=True)
            print(f"    {mutant.before}\n    {mutant.after}", flush=True)
    result = score(drawn, total, results, given.seed, saved["seconds"] + time.monotonic() - begin)
    if given.only:
        print(json.dumps(result["by_module"], indent=2))
        return 0
    (HERE / "score.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['killed']} of {result['sample']} killed, {result['score']:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
