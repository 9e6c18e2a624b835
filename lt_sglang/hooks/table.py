"""Every SGLang function we wrap: its name, the parameters we rely on, why, and when the hook can go.

Subclassing, registries and resolution hooks need no entry; they are checked by tests/contract.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.hooks import wrappers


@dataclass(frozen=True)
class Hook:
    """target: dotted name. parameters: the names it takes, in order."""

    target: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    why: str
    delete_when: str


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.tp_worker.TpModelWorker._init_model_runner",
        parameters=("self",),
        wrapper=wrappers.init_model_runner,
        why="SGLang has no registry of model runners",
        delete_when="the worker asks a registry which runner to build",
    ),
    Hook(
        target="sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        parameters=(
            "self",
            "batch",
            "forward_batch",
            "pp_proxy_tensors",
            "is_verify",
            "skip_attn_backend_init",
            "capture_hidden_mode",
            "return_kv_loc_plan",
        ),
        wrapper=wrappers.forward_batch,
        why="dynamic mode plans the layers of a prefill by its requests, which ForwardBatch does not name",
        delete_when="ForwardBatch carries the requests' prompts",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController._add_topology",
        parameters=("self", "state"),
        wrapper=wrappers.add_state,
        why="/server_info has no contributors from plug-ins",
        delete_when="get_internal_state takes contributors",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.invariant_checker."
        "SchedulerInvariantChecker._check_all_pools",
        parameters=("self", "ps", "uncached"),
        wrapper=wrappers.check_pools,
        why="the idle leak check does not know sink rows",
        delete_when="the checker asks the tree cache for pools of its own",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.metrics_reporter."
        "SchedulerMetricsReporter._record_scheduler_time",
        parameters=("self", "is_idle", "event_ns"),
        wrapper=wrappers.publish_metrics,
        why="a scheduler tells plug-ins neither that time passes nor that it falls idle",
        delete_when="the reporter asks plug-ins for metrics of their own",
    ),
    Hook(
        target="sglang.srt.distributed.device_communicators.pynccl.PyNcclCommunicator.__init__",
        parameters=("self", "group", "device", "library_path", "is_symmetric_memory_enabled", "cta_policy"),
        wrapper=wrappers.skip_pynccl_on_cpu,
        why="tensor parallelism on a CPU builds NCCL communicators and fails",
        delete_when="SGLang builds none for CPU groups",
    ),
)


def install() -> None:
    """Register every hook; raises LightTransferError if a target is gone or changed its parameters."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    problems = [problem for hook in HOOKS if (problem := check_target(hook))]
    if problems:
        raise LightTransferError("hooks: " + "; ".join(problems))
    for hook in HOOKS:
        HookRegistry.register(hook.target, hook.wrapper, HookType.AROUND)


def check_target(hook: Hook) -> str | None:
    """What is wrong with the SGLang function a hook wraps, or None."""
    try:
        function = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError) as error:
        return f"{hook.target} does not exist in this SGLang ({error})"
    found = tuple(inspect.signature(inspect.unwrap(function)).parameters)
    if found != hook.parameters:
        return f"{hook.target} takes {found}, expected {hook.parameters}"
    return None


def check_applied() -> None:
    """Raise LightTransferError unless every hook is in place in this process."""
    for hook in HOOKS:
        function = pkgutil.resolve_name(hook.target)
        if getattr(function, "__wrapped__", None) is None:
            raise LightTransferError(
                f"hooks: {hook.target} is not wrapped in this process; the log says why above; "
                "run lt-sglang doctor"
            )
