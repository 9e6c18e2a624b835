"""Read the few SGLang flags we need from a command line that SGLang itself will parse.

Nothing is imported from SGLang (that takes seconds), and nothing is taken away: the last value given
counts, and the command line outranks the file of ``--config``, as in SGLang.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.numerals import read_float, read_int

ATTENTION_BACKEND = ("--attention-backend",)
PREFILL_BACKEND = ("--prefill-attention-backend",)
DECODE_BACKEND = ("--decode-attention-backend",)
MODEL_OVERRIDES = ("--json-model-override-args",)
MODEL_PATH = ("--model-path", "--model")
REVISION = ("--revision",)
LOAD_FORMAT = ("--load-format",)
TP_SIZE = ("--tp-size", "--tensor-parallel-size", "--tp")
NNODES = ("--nnodes",)
CONTEXT_LENGTH = ("--context-length",)
MEM_FRACTION = ("--mem-fraction-static",)
MAX_TOTAL_TOKENS = ("--max-total-tokens",)
KV_CACHE_DTYPE = ("--kv-cache-dtype",)
CHUNK = ("--chunked-prefill-size",)
DEVICE = ("--device",)
HOST = ("--host",)
PORT = ("--port",)
CONFIG_FILE = ("--config",)
NODE_RANK = ("--node-rank",)
NCCL_PORT = ("--nccl-port",)
DIST_ADDRESS = ("--dist-init-addr", "--nccl-init-addr")
GRPC_PORT = ("--grpc-port",)
ADMIN_KEY = ("--admin-api-key",)
TOKENIZER_WORKERS = ("--tokenizer-worker-num",)

# Every flag read here or added to the command line.
KNOWN_FLAGS = (
    *ATTENTION_BACKEND,
    *PREFILL_BACKEND,
    *DECODE_BACKEND,
    *MODEL_OVERRIDES,
    *MODEL_PATH,
    *REVISION,
    *LOAD_FORMAT,
    *TP_SIZE,
    *NNODES,
    *CONTEXT_LENGTH,
    *MEM_FRACTION,
    *MAX_TOTAL_TOKENS,
    *KV_CACHE_DTYPE,
    *CHUNK,
    *DEVICE,
    *HOST,
    *PORT,
    *CONFIG_FILE,
    *NODE_RANK,
    *NCCL_PORT,
    *DIST_ADDRESS,
    *GRPC_PORT,
    *ADMIN_KEY,
    *TOKENIZER_WORKERS,
)


class SglangArgs:
    """SGLang's arguments as given, with lookups.

    Attributes:
        argv: the arguments, in order, as SGLang will get them.
    """

    def __init__(self, argv: list[str]) -> None:
        if argv and not argv[0].startswith("-"):
            argv = ["--model-path", *argv]  # as `sglang serve MODEL`
        _refuse_abbreviations(argv)
        self.argv = argv
        path = _find(argv, CONFIG_FILE)
        self._file = _read_config_file(path) if path is not None else []

    def get(self, flags: tuple[str, ...]) -> str | None:
        """The value of the first of ``flags``' spellings that SGLang will use, or None."""
        value = _find(self.argv, flags)
        return value if value is not None else _find(self._file, flags)

    def typed(self, flags: tuple[str, ...]) -> str:
        """The spelling of a flag that was typed; the first of ``flags`` if none was."""
        given = [arg.partition("=")[0] for arg in self.argv]
        return next((flag for flag in reversed(given) if flag in flags), flags[0])

    def has(self, flag: str) -> bool:
        """Whether ``flag`` is given, with or without a value."""
        return any(arg == flag or arg.startswith(flag + "=") for arg in (*self.argv, *self._file))

    def get_int(self, flags: tuple[str, ...], default: int, most: int = 1 << 31) -> int:
        """As get, for an integer from 1 to ``most``; raises LightTransferError on anything else."""
        value = self.get(flags)
        if value is None:
            return default
        number = read_int(value)
        if number is None or number < 1:
            raise LightTransferError(f"{self.typed(flags)}: {value!r} is not an integer from 1")
        if number > most:
            raise LightTransferError(f"{self.typed(flags)}: {value} is not an integer from 1 to {most}")
        return number

    def get_share(self, flags: tuple[str, ...], default: float) -> float:
        """As get, for a number between 0 and 1; raises LightTransferError on anything else."""
        value = self.get(flags)
        share = default if value is None else read_float(value)
        if share is None or not 0 < share < 1:
            raise LightTransferError(f"{self.typed(flags)}: {value!r} is not a share between 0 and 1")
        return share

    def unread(self, flags: tuple[str, ...]) -> list[str]:
        """The flags given that are not among ``flags``, as they were typed."""
        given = [arg.partition("=")[0] for arg in self.argv if arg.startswith("--")]
        return [flag for flag in given if flag not in flags]

    def overrides(self) -> dict[str, Any]:
        """The object given with ``--json-model-override-args``; empty if there is none."""
        flag = MODEL_OVERRIDES[0]
        text = self.get(MODEL_OVERRIDES) or "{}"
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise LightTransferError(f"{flag}: not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise LightTransferError(f"{flag}: must be an object, not {type(value).__name__}")
        return value

    def replaced(
        self, values: dict[tuple[str, ...], str], without: tuple[tuple[str, ...], ...] = ()
    ) -> list[str]:
        """The arguments with ``values`` instead of what was given for these flags; ours come last and win.

        without: flags that are left out.
        """
        argv = self.argv
        for flags in without:
            argv = _without(argv, flags)
        for flags in values:
            argv = _without(argv, flags)
        return [*argv, *(part for flags, value in values.items() for part in (flags[0], value))]


def _find(argv: list[str], flags: tuple[str, ...]) -> str | None:
    found = None
    for index, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag not in flags:
            continue
        if equals:
            found = value
        elif index + 1 < len(argv):
            found = argv[index + 1]
        else:
            raise LightTransferError(f"{flag}: a value is missing")
    return found


def _without(argv: list[str], flags: tuple[str, ...]) -> list[str]:
    kept: list[str] = []
    skip = False
    for arg in argv:
        if skip:
            skip = False
        elif arg in flags:
            skip = True
        elif arg.partition("=")[0] not in flags:
            kept.append(arg)
    return kept


def _refuse_abbreviations(argv: list[str]) -> None:
    # argparse accepts --attention-b for --attention-backend; read as another flag here, it would
    # reach SGLang and be overridden by the value we append.
    for arg in argv:
        flag = arg.partition("=")[0]
        if not flag.startswith("--") or len(flag) < 5 or flag in KNOWN_FLAGS:
            continue
        for known in KNOWN_FLAGS:
            if known.startswith(flag):
                raise LightTransferError(f"{flag}: write {known} in full")


def _read_config_file(path: str) -> list[str]:
    """The YAML file of ``--config`` as arguments, for lookups only."""
    import yaml  # comes with SGLang; rarely needed

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LightTransferError(f"--config {path}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise LightTransferError(f"--config {path}: must be a mapping of flags to values")
    argv: list[str] = []
    for key, value in data.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        argv.append(f"--{str(key).replace('_', '-')}={text}")
    return argv
