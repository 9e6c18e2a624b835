"""Check every engine that a command is going to start before it starts the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lt_sglang.doctor import check_starts
from lt_sglang.errors import LightTransferError
from lt_sglang.launch import sglang_args as flags
from lt_sglang.launch.cpu import has_gpu
from lt_sglang.launch.model_config import check_tp, read_model_config
from lt_sglang.launch.sglang_args import SglangArgs
from lt_sglang.launch.weights import check_weights


def check_engines(commands: Mapping[str, Sequence[str]]) -> None:
    """Raise LightTransferError, naming the engine, if one of several would not start.

    commands: by name, the command line of each engine. A single one is not looked at: its start says as
    much, as soon.
    """
    arguments = {name: _arguments(command) for name, command in commands.items()}
    if len(arguments) < 2:
        return
    on_gpu = has_gpu()
    for name, argv in arguments.items():
        try:
            _check_model(SglangArgs(list(argv)), on_gpu)
        except LightTransferError as error:
            raise LightTransferError(f"{name}: {error}") from None
    for check in check_starts(arguments, on_gpu):
        if not check.ok:
            raise LightTransferError(f"{check.name}: {check.message}")


def _check_model(args: SglangArgs, on_gpu: bool) -> None:
    config = read_model_config(args.get(flags.MODEL_PATH) or "", args.get(flags.REVISION))
    if config is not None and on_gpu:
        check_tp(config, args.get_int(flags.TP_SIZE, 1), flags.TP_SIZE[0])
    check_weights(args)


def _arguments(command: Sequence[str]) -> list[str]:
    """SGLang's part of a command line: all from the first flag of it on."""
    first = next((place for place, word in enumerate(command) if word.startswith("--")), len(command))
    return list(command[first:])
