"""``lt-sglang doctor``: what would a server start find here?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import chain

from lt_sglang.doctor import Check, DoctorError, check_arguments, check_machine, run_check
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.cpu import has_gpu
from lt_sglang.launch.model_config import read_model_config, unsupported_features
from lt_sglang.launch.options import OPTIONS_HELP, describe
from lt_sglang.launch.plan import Launch, check_ports, plan_launch
from lt_sglang.launch.sglang_args import REVISION
from lt_sglang.launch.weights import check_weights

HELP = f"""\
usage: lt-sglang doctor [--json] [--model-path MODEL [--lt-...] [any SGLang flag]]

Runs the checks of a server start without starting one, and prints a line for each. With a model, also the
configuration of its lazy layers, its features and the SGLang flags. Exit code 1 if a check fails.

{OPTIONS_HELP}"""


def run(argv: list[str]) -> int:
    """Print the checks as they come; 0 if all are well, else 1."""
    if any(arg in ("-h", "--help") for arg in argv):
        print(HELP)
        return 0
    as_json = "--json" in argv
    rest = [arg for arg in argv if arg != "--json"]
    checks: list[Check] = []
    for check in chain(check_machine(has_gpu()), check_model(rest) if rest else ()):
        checks.append(check)
        if not as_json:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.message}", flush=True)
    if as_json:
        print(json.dumps([vars(check) for check in checks], indent=2))
    return 0 if all(check.ok for check in checks) else 1


def check_model(argv: list[str]) -> Iterator[Check]:
    """Check the server that ``lt-sglang serve`` would start with ``argv``."""
    try:
        launch = plan_launch(argv, os.environ)
    except LightTransferError as error:
        yield Check("configuration", False, " ".join(str(error).split()))
        return
    yield run_check("configuration", lambda: _check_configuration(launch))
    features = run_check("model", lambda: _check_features(launch))
    yield features
    yield run_check("weights", lambda: check_weights(launch.args))
    yield run_check("ports", lambda: _check_ports(launch))
    if features.ok:
        yield run_check("flags", lambda: check_arguments(launch.argv, on_gpu=not launch.on_cpu))


def _check_configuration(launch: Launch) -> str:
    if launch.config is None:
        return f"{launch.model_path} cannot be looked up here; the server will look for its lazy layers"
    return describe(launch.config)


def _check_ports(launch: Launch) -> str:
    check_ports(launch)
    return f"{launch.url} is free"


def _check_features(launch: Launch) -> str:
    revision = launch.args.get(REVISION)
    config = read_model_config(launch.model_path, revision)
    if config is None:
        return f"{launch.model_path} cannot be looked up here"
    wrong = unsupported_features(config)
    if wrong:
        raise DoctorError(f"{launch.model_path} has {', '.join(wrong)}, which lazy layers do not support")
    names = config.get("architectures") or ["unnamed architecture"]
    return f"{names[0]} has no feature that lazy layers do not support"
