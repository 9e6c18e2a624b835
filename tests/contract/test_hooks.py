"""The hooks table against the installed SGLang."""

from __future__ import annotations

import inspect
import os
from dataclasses import replace

import pytest

from lt_sglang import doctor
from lt_sglang.hooks.table import HOOKS
from lt_sglang.launch.cpu import has_gpu
from lt_sglang.upstream.hook import Hook, check_target


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target.rpartition(".")[2])
def test_target_exists_and_takes_what_was_recorded(hook: Hook) -> None:
    assert check_target(hook) is None


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target.rpartition(".")[2])
def test_wrapper_takes_the_original_and_its_parameters(hook: Hook) -> None:
    signature = inspect.signature(hook.wrapper)
    signature.bind(lambda: None, *hook.parameters)
    first = next(iter(signature.parameters.values()))
    assert first.name == "original"


def test_every_hook_says_why_and_until_when() -> None:
    assert len({hook.target for hook in HOOKS}) == len(HOOKS)
    for hook in HOOKS:
        assert hook.why and hook.delete_when


def test_a_changed_upstream_is_noticed() -> None:
    hook = HOOKS[0]
    for broken, message in (
        (replace(hook, target=hook.target + "_gone"), "does not exist"),
        (replace(hook, target="sglang.gone.module.function"), "does not exist"),
        (replace(hook, parameters=(*hook.parameters, "more")), "takes"),
    ):
        problem = check_target(broken)
        assert problem is not None
        assert message in problem


def test_a_worker_process_has_every_hook_and_registration() -> None:
    """In a process of its own: applied hooks stay."""
    if not any(True for _ in doctor.metadata.entry_points(group=doctor.PLUGIN_GROUP)):
        pytest.fail("the plug-in's entry point is not installed here; run through make")
    checks = {check.name: check for check in doctor.check_inner_names(on_gpu=has_gpu())}
    assert set(checks) == {"signatures", "overrides", "fingerprints", "attributes", "hooks", "registries"}
    assert not [check.message for check in checks.values() if not check.ok]
    assert os.environ.get("LT_SGLANG_ACTIVE") is None, "the child's environment is its own"
