"""Work out the command line and the environment of a server with lazy layers.

Nothing heavy is imported here. What comes out is started as a new program (``python -m
lt_sglang.cli.server``): without a GPU, the dynamic linker and OpenMP need their variables before Python
starts. It is one on every machine, so that there is one path.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lt_sglang.config import CONFIG_KEY, DYNAMIC_FIELDS, LIST, LightTransferConfig
from lt_sglang.demo.smollm2 import DemoModelMissing, ensure_model
from lt_sglang.errors import LightTransferError
from lt_sglang.launch import admin
from lt_sglang.launch import sglang_args as flags
from lt_sglang.launch.admin import KEY_VARIABLE, Admin
from lt_sglang.launch.cpu import CPU_LIMITS, CompilerMissing, cpu_environment, cpu_server_args, has_gpu
from lt_sglang.launch.model_config import check_tp, read_model_config
from lt_sglang.launch.options import LtOptions, resolve_config, take_options
from lt_sglang.launch.ports import check_port
from lt_sglang.launch.ready import TRY_VARIABLE, URL_VARIABLE, base_url, say
from lt_sglang.launch.sglang_args import SglangArgs
from lt_sglang.names import BACKEND
from lt_sglang.numerals import read_int

# Half of SmolLM2's 30 layers, from lt-sglang calibrate --greedy 32 --windows prefill. What they cost is in
# docs/quality.md (static-greedy-50 of loadtest/experiments/quality.yaml, greedy-list-50 of
# loadtest/conversations.yaml).
DEMO_LAZY_LAYERS = "0-5,10-13,16,25,27-29"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 30000  # SGLang's
LAST_PORT = 65535
SERVER_MODULE = "lt_sglang.cli.server"
NO_HTTP = ("--grpc-mode", "--smg-grpc-mode", "--encoder-only")


@dataclass(frozen=True)
class Launch:
    """What to start: SGLang's arguments, the whole environment, and what to tell the user.

    config is None if only SGLang's process can find it (a model this machine cannot look up by itself).
    model_config: the model's config.json; None if it was not found.
    limits: of SGLang's arguments, those added so that a small machine's memory is not filled.
    admin: the key of SGLang's admin routes; it travels in env.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    model_path: str
    config: LightTransferConfig | None
    model_config: Mapping[str, Any] | None
    url: str
    try_line: str
    on_cpu: bool
    limits: tuple[str, ...] = ()
    admin: Admin = Admin()

    @property
    def command(self) -> list[str]:
        """The command line of the server process."""
        return [sys.executable, "-m", SERVER_MODULE, *self.argv]

    @property
    def args(self) -> SglangArgs:
        """SGLang's arguments, for lookups."""
        return SglangArgs(list(self.argv))


@dataclass(frozen=True)
class Machine:
    """What plan_launch asks of the machine it runs on; tests pass their own."""

    has_gpu: Callable[[], bool] = has_gpu
    cpu_environment: Callable[[int, Mapping[str, str]], dict[str, str]] = cpu_environment
    demo_model: Callable[[], Path] = ensure_model
    model_config: Callable[[str, str | None], dict[str, object] | None] = read_model_config


def plan_launch(argv: list[str], env: Mapping[str, str], machine: Machine | None = None) -> Launch:
    """Work out the command line and the environment of the server.

    Raises:
        LightTransferError: on a bad option, a conflicting backend and a model without lazy layers. May
            convert the demonstration model and compile the driver stub, both once per machine.
    """
    machine = machine or Machine()
    leave_open, rest = admin.take_option(argv)
    options, rest = take_options(rest)
    args = SglangArgs(rest)
    _check_backends(args)
    overrides = args.overrides()
    tp = args.get_int(flags.TP_SIZE, 1)
    port = args.get_int(flags.PORT, DEFAULT_PORT, most=LAST_PORT)
    url = base_url(args.argv, args.get(flags.HOST), port)
    on_cpu = _on_cpu(args, machine.has_gpu)

    model_path = args.get(flags.MODEL_PATH)
    demo = model_path is None
    if model_path is None:
        model_path = _demo_model(machine)
        if options.config is None:
            overrides.setdefault(CONFIG_KEY, _demo_config(options))
        args = SglangArgs([*args.argv, "--model-path", model_path])
    model_config = machine.model_config(model_path, args.get(flags.REVISION))
    config = resolve_config(options, model_path, model_config, overrides)
    if model_config is not None and not on_cpu:
        check_tp(model_config, tp, args.typed(flags.TP_SIZE))

    values: dict[tuple[str, ...], str] = {flags.ATTENTION_BACKEND: BACKEND}
    if config is not None:
        values[flags.MODEL_OVERRIDES] = json.dumps({**overrides, CONFIG_KEY: config.to_dict()})
    limits = _missing_limits(args) if on_cpu or demo else []
    final = args.replaced(values, without=(flags.ADMIN_KEY,)) + limits
    changes: dict[str, str] = {}
    if on_cpu:
        final += _missing_cpu_args(args)
        changes = _cpu_environment(machine, tp, env)
    try_line = _try_line(url, demo)
    # Other nodes, and servers that speak gRPC only, never answer /ready.
    silent = args.get(flags.NODE_RANK) not in (None, "0") or any(map(args.has, NO_HTTP))
    chosen = admin.choose_key(args, env, leave_open, has_routes=not silent)
    news = {URL_VARIABLE: "" if silent else url, TRY_VARIABLE: try_line, KEY_VARIABLE: chosen.key or ""}
    return Launch(
        argv=tuple(final),
        env={**env, **changes, **news},
        model_path=model_path,
        config=config,
        model_config=model_config,
        url=url,
        try_line=try_line,
        on_cpu=on_cpu,
        limits=tuple(limits),
        admin=chosen,
    )


def stock_command(
    argv: list[str], env: Mapping[str, str], machine: Machine | None = None
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of SGLang with full attention; raises LightTransferError.

    argv: SGLang's arguments; without an attention backend among them, a CPU has torch_native.
    """
    machine, args = machine or Machine(has_gpu=has_gpu), SglangArgs(argv)
    # The plug-in does nothing unless its backend is asked for; stock is to be stock all the same.
    changes, missing = {"SGLANG_PLUGINS": "none"}, []
    if _on_cpu(args, machine.has_gpu):
        missing = [*_missing_limits(args), *_missing_cpu_args(args)]
        if args.get(flags.ATTENTION_BACKEND) is None:
            missing += [flags.ATTENTION_BACKEND[0], "torch_native"]
        changes |= _cpu_environment(machine, args.get_int(flags.TP_SIZE, 1), env)
    command = [sys.executable, "-m", "lt_sglang.launch.tied", "sglang.launch_server", *argv, *missing]
    return command, {**env, **changes}


def check_ports(launch: Launch) -> None:
    """Raise LightTransferError unless the ports that the server is told to take are free now.

    SGLang finds that out when the model is loaded. Ports it chooses itself are free when it chooses them.
    """
    args = launch.args
    host = args.get(flags.HOST)
    host = DEFAULT_HOST if host is None else host
    asked = {flags.PORT[0]: args.get_int(flags.PORT, DEFAULT_PORT, most=LAST_PORT)}
    for names in (flags.GRPC_PORT, flags.NCCL_PORT):
        if args.get(names) is not None:
            asked[names[0]] = args.get_int(names, DEFAULT_PORT, most=LAST_PORT)
    if (address := args.get(flags.DIST_ADDRESS)) is not None and args.get(flags.NODE_RANK) in (None, "0"):
        port = read_int(address.rpartition(":")[2])
        if port is None or not 1 <= port <= LAST_PORT:
            raise LightTransferError(f"{flags.DIST_ADDRESS[0]}: {address!r} is not HOST:PORT")
        asked[flags.DIST_ADDRESS[0]] = port
        asked.pop(flags.NCCL_PORT[0], None)  # then nobody listens there
    for flag, port in asked.items():
        twins = [other for other, number in asked.items() if number == port and other != flag]
        if twins:
            raise LightTransferError(f"{flag} {port}: {twins[0]} is the same port; choose another one")
        # torch listens on all addresses for the ranks to meet.
        check_port(host if flag in (flags.PORT[0], flags.GRPC_PORT[0]) else "", port, flag)


def _check_backends(args: SglangArgs) -> None:
    for names in (flags.ATTENTION_BACKEND, flags.PREFILL_BACKEND, flags.DECODE_BACKEND):
        name = args.get(names)
        if name not in (None, BACKEND):
            raise LightTransferError(
                f"{names[0]} {name}: lt-sglang serves with {BACKEND}; leave the flag out, or serve without "
                "lazy layers: python -m sglang.launch_server"
            )


def _demo_config(options: LtOptions) -> dict[str, object]:
    """The list, cut after the prompt as chats should have it, unless options choose otherwise."""
    chosen = (getattr(options, name) for name in ("mode", "lazy_layers", *DYNAMIC_FIELDS))
    after_prompt = {} if any(value is not None for value in chosen) else {"mode": "dynamic", "score": LIST}
    return {**after_prompt, "lazy_layers": DEMO_LAZY_LAYERS, "source": "the demonstration"}


def _demo_model(machine: Machine) -> str:
    say("no --model-path given: serving the demonstration model SmolLM2-135M-Instruct")
    try:
        return str(machine.demo_model())
    except DemoModelMissing as error:
        raise LightTransferError(str(error)) from None


def _on_cpu(args: SglangArgs, has_gpu: Callable[[], bool]) -> bool:
    device = args.get(flags.DEVICE)
    return device == "cpu" or (device is None and not has_gpu())


def _cpu_environment(machine: Machine, tp: int, env: Mapping[str, str]) -> dict[str, str]:
    try:
        return machine.cpu_environment(tp, env)
    except CompilerMissing as error:
        raise LightTransferError(str(error)) from None


def _missing_cpu_args(args: SglangArgs) -> list[str]:
    ours = cpu_server_args()
    pairs = [ours[index : index + 2] for index in range(0, len(ours), 2)]
    return [part for pair in pairs if not args.has(pair[0]) for part in pair]


def _missing_limits(args: SglangArgs) -> list[str]:
    """CPU_LIMITS, but for what is given; KV memory may be given as a share, too."""
    given = {"--max-total-tokens": args.has("--mem-fraction-static")}
    return [part for pair in CPU_LIMITS if not (args.has(pair[0]) or given.get(pair[0])) for part in pair]


def _try_line(url: str, chat: bool) -> str:
    if chat:
        path = "chat/completions"
        body: dict[str, object] = {"messages": [{"role": "user", "content": "Name three primary colors."}]}
    else:
        path, body = "completions", {"prompt": "The capital of France is"}
    text = json.dumps({"model": "default", **body, "max_tokens": 32, "temperature": 0})
    return f"curl -s {url}/v1/{path} -H 'Content-Type: application/json' -d '{text}'"
