"""lt_sglang.hooks: what each wrapper does around SGLang's function, and that a missing one is noticed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.model_executor.model_runner as runner_module
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from lt_sglang import model_runner
from lt_sglang.config import CONFIG_KEY, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.hooks import table, wrappers
from lt_sglang.hooks.table import HOOKS, SCHEDULER_HOOKS
from lt_sglang.memory.sinks import SinkStore
from lt_sglang.upstream import hook as hook_module
from lt_sglang.upstream.hook import check_applied

CONFIG = LightTransferConfig((1, 3))


def worker(requested: bool) -> Any:
    hf_config = SimpleNamespace(**{CONFIG_KEY: CONFIG.to_dict()})
    return SimpleNamespace(
        server_args=SimpleNamespace(requested=requested), model_config=SimpleNamespace(hf_config=hf_config)
    )


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrappers, "is_requested", lambda args: args.requested)


def test_a_worker_builds_our_runner_only_if_it_was_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """And SGLang's class is back afterwards, whatever happens."""
    stock, built = runner_module.ModelRunner, []
    monkeypatch.setattr(
        model_runner, "LightTransferModelRunner", lambda *a, **k: built.append((a, k)) or "ours"
    )
    seen: list[Any] = []

    def original(given: Any) -> None:
        seen.append(runner_module.ModelRunner)
        if seen[-1] is not stock:
            assert seen[-1](1, two=2) == "ours"

    checked: list[int] = []

    def check() -> None:
        checked.append(len(built))

    wrappers.init_model_runner(original, worker(False), check)
    assert seen == [stock] and not built and not checked
    wrappers.init_model_runner(original, worker(True), check)
    assert checked == [0], "hooks are checked first"
    assert built == [((1,), {"lt_config": CONFIG, "two": 2})] and runner_module.ModelRunner is stock

    def fail(given: Any) -> None:
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        wrappers.init_model_runner(fail, worker(True), check)
    assert runner_module.ModelRunner is stock


def test_the_runner_hears_of_a_batch_before_it_runs() -> None:
    events: list[Any] = []

    def original(given: Any, batch: Any, *args: Any, **kwargs: Any) -> str:
        events.append(("run", batch, args, kwargs))
        return "result"

    ours = SimpleNamespace(begin_batch=lambda batch: events.append(("begin", batch)))
    here = SimpleNamespace(model_runner=ours)
    assert wrappers.forward_batch(original, here, "batch", 1, x=2) == "result"
    assert events == [("begin", "batch"), ("run", "batch", (1,), {"x": 2})]
    events.clear()
    wrappers.forward_batch(original, here, None)
    here.model_runner = SimpleNamespace()
    wrappers.forward_batch(original, here, "batch")
    assert [event[0] for event in events] == ["run", "run"]


def test_server_info_gets_our_state() -> None:
    def original(controller: Any, state: dict[str, Any]) -> None:
        state["stock"] = 1

    def controller(runner: Any) -> Any:
        return SimpleNamespace(scheduler=SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner)))

    state: dict[str, Any] = {}
    wrappers.add_state(original, controller(SimpleNamespace()), state)
    assert state == {"stock": 1}
    wrappers.add_state(original, controller(SimpleNamespace(lt_config=1, describe=lambda: "ours")), state)
    assert state == {"stock": 1, CONFIG_KEY: "ours"}


def checker(**caches: Any) -> Any:
    return SimpleNamespace(tree_cache=SimpleNamespace(next_check=0.0, **caches))


@pytest.mark.parametrize("leak", [False, True])
def test_the_leak_check_knows_our_stores(leak: bool) -> None:
    def original(given: Any, *args: Any, **kwargs: Any) -> tuple[bool, list[str]]:
        assert args == (1,) and kwargs == {"x": 2}
        return leak, ["stock"]

    def check(**caches: Any) -> Any:
        return wrappers.check_pools(original, checker(**caches), 1, x=2)

    assert check() == (leak, ["stock"])
    source: Any = SimpleNamespace(page_size=1)
    good, bad = (SinkStore(3, 1, 4, "cpu", source) for _ in range(2))
    bad._free.pop()
    assert check(sinks=good) == (leak, ["stock"])
    found, messages = check(sinks=bad)
    assert found is True and len(messages) == 2 and "lost or doubled" in messages[1]
    prefills = SimpleNamespace(sets=SimpleNamespace(check_integrity=lambda: ["sets"]))
    assert check(sinks=good, prefills=prefills) == (True, ["stock", "sets"])
    fine = SimpleNamespace(sets=SimpleNamespace(check_integrity=list))
    assert check(sinks=good, prefills=fine) == (leak, ["stock"])


def test_an_idle_scheduler_goes_through_the_stores_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """It checks in every round, and a request waits for the round that it arrives in."""
    now, checks = [7.0], []
    monkeypatch.setattr(wrappers.time, "monotonic", lambda: now[0])
    sinks = SimpleNamespace(check_integrity=lambda: checks.append(now[0]) or ["lost"])
    given = checker(sinks=sinks)
    found = []
    for now[0] in (7.0, 7.4, 7.9, 8.1, 8.2, 9.2):
        found.append(wrappers.check_pools(lambda checker: (False, []), given))
    assert checks == [7.0, 8.1, 9.2]
    assert [leak for leak, _ in found] == [True, False, False, True, False, True]


def test_metrics_tick_where_metrics_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    def original(reporter: Any, *, is_idle: bool, event_ns: int) -> None:
        events.append(("stock", is_idle, event_ns))

    import lt_sglang.metrics

    made: list[Any] = []
    ticker = SimpleNamespace(tick=lambda idle: events.append(("tick", idle)))
    monkeypatch.setattr(lt_sglang.metrics, "ticker_for", lambda reporter: made.append(reporter) or ticker)
    off, on = SimpleNamespace(enable_metrics=False), SimpleNamespace(enable_metrics=True)
    wrappers.publish_metrics(original, off, False, 5)
    assert events == [("stock", False, 5)] and not made
    wrappers.publish_metrics(original, on, True, 6)
    wrappers.publish_metrics(original, on, False, 7)
    assert events[1:] == [("stock", True, 6), ("tick", True), ("stock", False, 7), ("tick", False)]
    assert made == [on], "one for each reporter"


@pytest.mark.parametrize("gpu", [False, True])
def test_nccl_is_left_alone_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    called: list[Any] = []
    communicator = SimpleNamespace()
    wrappers.skip_pynccl_on_cpu(lambda *a, **k: called.append((a, k)), communicator, "group", device=0)
    if gpu:
        assert called == [((communicator, "group"), {"device": 0})] and not vars(communicator)
    else:
        assert not called and vars(communicator) == {"available": False, "disabled": True}


def test_hooks_are_registered_around_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(HookRegistry, "register", lambda *given: registered.append(given))
    table.install()
    assert registered == [(hook.target, hook.wrapper, HookType.AROUND) for hook in SCHEDULER_HOOKS]


def test_nothing_is_registered_if_one_target_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(HookRegistry, "register", lambda *given: registered.append(given))
    broken = replace(HOOKS[0], parameters=("self", "more"))
    monkeypatch.setattr(table, "HOOKS", (HOOKS[1], broken, replace(HOOKS[2], target="sglang.gone")))
    install = table.install
    defaults = install.__defaults__ and ((table.HOOKS,))
    with pytest.raises(
        LightTransferError, match=r"takes \('self',\), expected .*; sglang.gone does not exist"
    ):
        install(*(defaults or ()))
    assert not registered


def test_a_hook_that_is_not_in_place_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang only logs that a plug-in failed. How ours is told from others': test_hooks_applied.py."""
    missing: set[str] = set()
    monkeypatch.setattr(hook_module, "applied", lambda hook: hook.target not in missing)
    check_applied(SCHEDULER_HOOKS)
    for hook in SCHEDULER_HOOKS:
        missing = {hook.target}
        with pytest.raises(LightTransferError, match=f"hooks: {hook.target} is not wrapped in this process"):
            check_applied(SCHEDULER_HOOKS)
    missing = {hook.target for hook in HOOKS if not hook.in_scheduler}
    check_applied(SCHEDULER_HOOKS)
