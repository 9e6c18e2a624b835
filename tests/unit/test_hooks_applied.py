"""upstream.hook.check_applied: our wrapper is in place, whoever else wraps the same function."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from lt_sglang.errors import LightTransferError
from lt_sglang.upstream.hook import Hook, check_applied

MODULE = "lt_sglang_hook_target"


def ours(original: Callable[[int], int], number: int) -> int:
    return original(number) + 1


def theirs(original: Callable[[int], int], number: int) -> int:
    return original(number) + 10


HOOK = Hook(f"{MODULE}.Class.method", ("number",), ours, "for tests", "never")


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class with one static method, in a module of its own; SGLang's registry is empty, and empty again."""

    class Class:
        @staticmethod
        def method(number: int) -> int:
            return number

    module = ModuleType(MODULE)
    module.Class = Class  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(HookRegistry, "_hooks", {HOOK.target: []})
    monkeypatch.setattr(HookRegistry, "_patched", set())
    return Class


def register(*wrappers: Callable[..., Any], how: HookType = HookType.AROUND) -> None:
    for wrapper in wrappers:
        HookRegistry.register(HOOK.target, wrapper, how)
    HookRegistry.apply_hooks()


def wrap_by_hand(target: type) -> None:
    original = target.method  # type: ignore[attr-defined]

    @functools.wraps(original)
    def wrapper(number: int) -> int:
        return original(number) + 10

    target.method = staticmethod(wrapper)  # type: ignore[attr-defined]


def refused() -> None:
    with pytest.raises(LightTransferError, match=rf"^hooks: {MODULE}\.Class\.method is not wrapped"):
        check_applied((HOOK,))


def test_nothing_applied(target: Any) -> None:
    refused()


def test_ours_alone(target: Any) -> None:
    register(ours)
    check_applied((HOOK,))
    assert target.method(0) == 1


def test_anybody_s_wrapper_is_not_ours(target: Any) -> None:
    """It has a ``__wrapped__`` all the same."""
    wrap_by_hand(target)
    assert target.method.__wrapped__ is not None
    refused()


def test_another_plug_in_s_hook_is_not_ours(target: Any) -> None:
    register(theirs)
    refused()


@pytest.mark.parametrize("wrappers", [(ours, theirs), (theirs, ours)])
def test_beside_another_plug_in_s_hook(target: Any, wrappers: tuple[Callable[..., Any], ...]) -> None:
    register(*wrappers)
    check_applied((HOOK,))
    assert target.method(0) == 11


def test_wrapped_again_after_us(target: Any) -> None:
    register(ours)
    wrap_by_hand(target)
    check_applied((HOOK,))
    assert target.method(0) == 11


def test_taken_out_again(target: Any) -> None:
    original = target.method
    register(ours)
    target.method = staticmethod(original)
    refused()


def test_as_another_kind_of_hook_it_does_not_count_for_what_it_wraps(target: Any) -> None:
    """A hook of the same function, registered for something else, is in no closure of this one."""
    module = sys.modules[MODULE]
    module.other = lambda number: number  # type: ignore[attr-defined]
    HookRegistry._hooks[f"{MODULE}.other"] = []
    HookRegistry.register(f"{MODULE}.other", ours, HookType.AROUND)
    HookRegistry.apply_hooks()
    refused()
