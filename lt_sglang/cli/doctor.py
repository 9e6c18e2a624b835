"""``lt-sglang doctor``: what would a server start find here?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

import psutil

from lt_sglang.cli.plan import DEFAULT_GPU, deployment
from lt_sglang.doctor import Check, DoctorError, check_arguments, check_machine, run_check
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.cpu import gpu_memory, has_gpu
from lt_sglang.launch.model_config import check_tp, unsupported_features
from lt_sglang.launch.options import OPTIONS_HELP, describe
from lt_sglang.launch.plan import Launch, check_ports, plan_launch
from lt_sglang.launch.sglang_args import MAX_TOTAL_TOKENS, NNODES, TP_SIZE
from lt_sglang.launch.weights import check_weights
from lt_sglang.planner.capacity import plan_length
from lt_sglang.planner.shapes import GIB, GPUS, shape_from_config

HELP = f"""\
usage: lt-sglang doctor [--json] [--model-path MODEL [--lt-...] [any SGLang flag]]

Runs the checks of a server start without starting one, and prints a line for each. With a model, its lazy
layers, features, weights and ports and what fits into the memory come first, SGLang's flags last. Exit code 1
if a check fails.

{OPTIONS_HELP}"""

USUAL_TOKENS = 8192  # of a request, to say how many fit


def run(argv: list[str]) -> int:
    """Print the checks as they come; 0 if all are well, else 1."""
    if any(arg in ("-h", "--help") for arg in argv):
        print(HELP)
        return 0
    as_json = "--json" in argv
    rest = [arg for arg in argv if arg != "--json"]
    checks: list[Check] = []
    machine = check_machine(has_gpu())
    for check in check_model(rest, machine) if rest else machine:
        checks.append(check)
        if not as_json:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.message}", flush=True)
    if as_json:
        print(json.dumps([vars(check) for check in checks], indent=2))
    return 0 if all(check.ok for check in checks) else 1


def check_model(argv: list[str], machine: Iterable[Check] = ()) -> Iterator[Check]:
    """Check the server that ``lt-sglang serve`` would start with ``argv``: first what takes no time.

    machine: the checks of the machine, which come before those that import SGLang.
    """
    try:
        launch = plan_launch(argv, os.environ)
    except LightTransferError as error:
        yield Check("configuration", False, " ".join(str(error).split()))
        yield from machine
        return
    yield run_check("configuration", lambda: _check_configuration(launch))
    features = run_check("model", lambda: _check_features(launch))
    yield features
    yield run_check("weights", lambda: check_weights(launch.args))
    yield run_check("memory", lambda: check_memory(launch, gpu_memory()))
    yield run_check("ports", lambda: _check_ports(launch))
    yield from machine
    if features.ok:
        yield run_check("flags", lambda: check_arguments(launch.argv, on_gpu=not launch.on_cpu))


def check_memory(launch: Launch, gpus: list[int]) -> str:
    """What fits into the memory; raises LightTransferError if nothing does, or GPUs are missing.

    gpus: bytes of each.
    """
    args, model = launch.args, launch.model_config
    if model is None or launch.config is None:
        return "not looked at: the model cannot be looked up here"
    shape = shape_from_config(model, launch.model_path)
    weights = f"{shape.total_weight_bytes / GIB:.3g} GiB of weights"
    if launch.on_cpu:
        free, limit = psutil.virtual_memory().available, args.get_int(MAX_TOTAL_TOKENS, 0)
        kv = limit * shape.layers * shape.kv_token_layer(2)
        need = shape.total_weight_bytes + kv
        if need > free:
            raise DoctorError(
                f"{weights} and {kv / GIB:.3g} GiB of KV do not fit into the {free / GIB:.3g} GiB that are "
                "free; a smaller --max-total-tokens needs less"
            )
        return f"{weights}, at most {kv / GIB:.3g} GiB of KV; {free / GIB:.3g} GiB are free"
    tp = args.get_int(TP_SIZE, 1)
    here = max(1, tp // args.get_int(NNODES, 1))
    if len(gpus) < here:
        raise DoctorError(f"{args.typed(TP_SIZE)} {tp}: needs {here} GPUs here, and there are {len(gpus)}")
    gpu = replace(GPUS[DEFAULT_GPU], name="GPU", memory=min(gpus[:here]))
    planned = deployment(args, shape, launch.config, gpu)
    tokens = min(planned.shape.max_tokens or USUAL_TOKENS, USUAL_TOKENS)
    plan = plan_length(planned, tokens - 1, 1)
    return (
        f"{weights}; about {planned.kv_budget / GIB:.3g} GiB for KV on each of {tp} GPUs hold "
        f"{plan.hybrid_requests} requests of {tokens} tokens at once, {plan.full_requests} with full "
        "attention; other lengths: lt-sglang plan"
    )


def _check_configuration(launch: Launch) -> str:
    if launch.config is None:
        return f"{launch.model_path} cannot be looked up here; the server will look for its lazy layers"
    return describe(launch.config)


def _check_ports(launch: Launch) -> str:
    check_ports(launch)
    return f"{launch.url} is free"


def _check_features(launch: Launch) -> str:
    config = launch.model_config
    if config is None:
        return f"{launch.model_path} cannot be looked up here"
    wrong = unsupported_features(config)
    if wrong:
        raise DoctorError(f"{launch.model_path} has {', '.join(wrong)}, which lazy layers do not support")
    names = config.get("architectures") or ["unnamed architecture"]
    padded = ""
    if launch.on_cpu:
        try:
            check_tp(config, launch.args.get_int(TP_SIZE, 1), launch.args.typed(TP_SIZE))
        except LightTransferError as error:
            padded = f"; SGLang pads heads on a CPU, but GPUs would refuse this: {error}"
    return f"{names[0]} has no feature that lazy layers do not support{padded}"
