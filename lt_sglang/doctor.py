"""The checks a server start depends on, without starting a server. ``lt-sglang doctor`` prints them.

Every check is a function that returns a sentence when all is well and raises DoctorError otherwise.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, NoReturn

from lt_sglang.errors import LightTransferError
from lt_sglang.names import ACTIVE_VARIABLE, BACKEND
from lt_sglang.upstream.recorded import SGLANG_VERSION

PLUGIN_GROUP = "sglang.srt.plugins"
PLUGIN_VALUE = "lt_sglang.plugin:register"
ALLOW_LIST_VARIABLE = "SGLANG_PLUGINS"
# Distributions whose version SGLang pins and the hybrid path depends on.
PINNED = ("torch", "flashinfer-python", "sglang-kernel")
MIN_CAPABILITY = (8, 0)
MOST_MESSAGE = 8192  # characters


class DoctorError(LightTransferError):
    """A check failed; the message says what, and what to do about it."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    message: str


def run_check(name: str, check: Callable[[], str]) -> Check:
    """Run one check; whatever it raises becomes a failed one."""
    try:
        return Check(name, True, check())
    except LightTransferError as error:
        return Check(name, False, " ".join(str(error).split()))
    except Exception as error:
        return Check(name, False, " ".join(f"{type(error).__name__}: {error}".split()))


def check_start() -> None:
    """The checks that are cheap enough for every server start; raises LightTransferError."""
    check_sglang_version()
    check_entry_point()


def check_machine(on_gpu: bool) -> Iterator[Check]:
    """Versions, plug-in, hooks, SGLang's inner names, and the device this machine would serve on.

    Imports torch and sglang in child processes only: on a machine without a GPU they load only with the
    environment of ``cpu_environment``.
    """
    yield run_check("sglang", check_sglang_version)
    for name in PINNED:
        yield run_check(name, partial(check_pinned, name))
    yield run_check("plug-in", check_entry_point)
    yield run_check("device", check_gpu if on_gpu else check_cpu)
    yield from check_inner_names(on_gpu)


def check_sglang_version() -> str:
    """SGLang is installed in the one release this package was written for."""
    found = _version("sglang")
    if found != SGLANG_VERSION:
        raise DoctorError(
            f"sglang {found} is installed, needed is {SGLANG_VERSION}: pip install sglang=={SGLANG_VERSION}"
        )
    return f"sglang {found}"


def check_pinned(name: str) -> str:
    """``name`` is installed in the version SGLang's own metadata asks for."""
    found, wanted = _version(name), pinned_version(name)
    if wanted is not None and found.partition("+")[0] != wanted:
        raise DoctorError(f"{name} {found} is installed, sglang pins {wanted}: pip install {name}=={wanted}")
    return f"{name} {found}" + (", as sglang pins" if wanted is not None else "")


def pinned_version(name: str) -> str | None:
    """The version sglang's metadata pins ``name`` to, or None if it pins none."""
    for requirement in metadata.requires("sglang") or ():
        text = requirement.partition(";")[0].replace("_", "-").replace(" ", "")
        head, equals, version = text.partition("==")
        if equals and head.partition("[")[0].lower() == name:
            return version
    return None


def check_entry_point() -> str:
    """SGLang will find, and is allowed to load, our plug-in."""
    found = [entry for entry in metadata.entry_points(group=PLUGIN_GROUP) if entry.value == PLUGIN_VALUE]
    if not found:
        raise DoctorError(
            f"the plug-in {PLUGIN_VALUE} is not installed for {sys.executable}: run "
            "pip install --no-deps -e . in the source folder of lt_sglang, or go through its make targets"
        )
    allowed = [name.strip() for name in os.environ.get(ALLOW_LIST_VARIABLE, "").split(",") if name.strip()]
    if allowed and found[0].name not in allowed:
        raise DoctorError(f"{ALLOW_LIST_VARIABLE} does not list {found[0].name}; add it")
    return f"entry point {found[0].name} = {PLUGIN_VALUE}"


def check_gpu() -> str:
    """A CUDA device of a generation the kernels run on."""
    line = _child("gpu", gpu=True)[0]
    name, major, minor, gib = line.split("|")
    need = "{}.{}".format(*MIN_CAPABILITY)
    if (int(major), int(minor)) < MIN_CAPABILITY:
        raise DoctorError(f"{name} has compute capability {major}.{minor}, needed is {need} or higher")
    return f"{name}, compute capability {major}.{minor}, {gib} GiB"


def check_cpu() -> str:
    """The stand-in for the CUDA driver can be built, so that SGLang starts on this CPU."""
    from lt_sglang.launch.cpu import CompilerMissing, cpu_environment

    try:
        changes = cpu_environment(1, os.environ)
    except CompilerMissing as error:
        raise DoctorError(str(error)) from None
    stub = changes.get("LD_LIBRARY_PATH", "the driver that is installed").rpartition(os.pathsep)[2]
    return f"no GPU: SGLang runs on the CPU (tests and demonstrations), libcuda from {stub}"


def check_arguments(argv: Iterable[str], on_gpu: bool) -> str:
    """SGLang and lt_sglang accept the server arguments ``argv`` together (as a start would find out)."""
    (check,) = check_starts({"flags": list(argv)}, on_gpu)
    if not check.ok:
        raise DoctorError(check.message)
    return check.message


def check_starts(arguments: Mapping[str, Sequence[str]], on_gpu: bool) -> list[Check]:
    """As check_arguments, for the server arguments of several engines, by name."""
    # CUDA, which SGLang looks for as it is imported, does not survive a fork: a process for each.
    together = [{name: argv} for name, argv in arguments.items()] if on_gpu else [dict(arguments)]
    with ThreadPoolExecutor() as pool:
        lines = pool.map(lambda some: _child("starts", json.dumps(some), gpu=on_gpu), together)
        fields = [line.split("|", 2) for found in lines for line in found]
    return [Check(name, state == "ok", message) for name, state, message in fields]


def check_inner_names(on_gpu: bool) -> list[Check]:
    """Hooks, registries and overridden methods, checked in a process set up like a server's worker."""
    try:
        lines = _child("names", gpu=on_gpu)
    except LightTransferError as error:
        return [Check("hooks", False, str(error))]
    fields = [line.split("|", 2) for line in lines if line.count("|") >= 2]
    return [Check(name, state == "ok", message) for name, state, message in fields]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        raise DoctorError(f"{name} is not installed for {sys.executable}") from None


def _child(what: str, *argv: str, gpu: bool) -> list[str]:
    """Lines that ``child_main(what, argv)`` prints in a fresh interpreter."""
    env = dict(os.environ)
    if not gpu:
        from lt_sglang.launch.cpu import cpu_environment

        env.update(cpu_environment(1, os.environ))
    command = [sys.executable, "-W", "ignore", "-m", "lt_sglang.doctor", what, *argv]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise DoctorError("importing SGLang took more than 300 s") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DoctorError(f"SGLang cannot be imported here: {last}")
    lines = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        raise DoctorError("the check printed nothing")
    return lines


# SGLang logs to stdout as well; only lines with this mark are ours.
_MARK = "lt-doctor:"


def child_main(what: str, argv: list[str]) -> None:
    """What runs in the child: prints marked lines ``a|b|c``."""
    if what == "starts":
        engines = json.loads(argv[0])
        for name, given in engines.items():
            alone = len(engines) == 1
            result = (
                run_check(name, partial(_resolve_arguments, given)) if alone else _resolve_apart(name, given)
            )
            _emit(name, "ok" if result.ok else "FAIL", result.message)
        return
    if what == "gpu":
        import torch

        device = torch.cuda.get_device_properties(0)
        _emit(device.name, device.major, device.minor, f"{device.total_memory / 2**30:.1f}")
        return
    for name, check in _name_checks():
        result = run_check(name, check)
        _emit(result.name, "ok" if result.ok else "FAIL", result.message)


def _resolve_apart(name: str, argv: list[str]) -> Check:
    """_resolve_arguments in a fork, since it leaves traces in its process; SGLang is imported here, once."""
    import sglang.launch_server  # noqa: F401

    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            result = run_check(name, lambda: _resolve_arguments(argv))
            os.write(writer, json.dumps([result.ok, result.message[:MOST_MESSAGE]]).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    ok, message = json.loads(said) if said else (False, "SGLang ended while it read the arguments")
    return Check(name, ok, message)


def _resolve_arguments(argv: list[str]) -> str:
    server_arguments(argv).resolve_once()
    return "SGLang accepts the flags, and none is refused with lazy layers"


def server_arguments(argv: list[str]) -> Any:
    """SGLang's ServerArgs of ``argv``, with our plug-in loaded.

    Raises:
        DoctorError: on a bad flag, where SGLang's parser would print its usage of 480 lines and exit.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    usual = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = _refuse  # type: ignore[assignment, method-assign]
    try:
        return prepare_server_args(argv)
    finally:
        argparse.ArgumentParser.error = usual  # type: ignore[method-assign]


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    known = [flag for action in parser._actions for flag in action.option_strings]
    unknown = re.findall(r"--[\w-]+", message.partition("unrecognized arguments:")[2])
    near = [name for flag in unknown for name in difflib.get_close_matches(flag, known, n=1)]
    meant = f"; did you mean {' '.join(near)}?" if near else ""
    raise DoctorError(
        f"SGLang does not accept these flags: {message}{meant} (python -m sglang.launch_server --help)"
    )


def _name_checks() -> Iterable[tuple[str, Callable[[], str]]]:
    from lt_sglang.upstream import check as contract

    def of(problems: Callable[[], list[str]], good: str) -> Callable[[], str]:
        def run() -> str:
            wrong = problems()
            if wrong:
                raise DoctorError("; ".join(wrong))
            return good

        return run

    # Before the hooks are applied: afterwards a wrapped function would be compared with itself.
    yield "signatures", of(contract.check_signatures, "every SGLang function used takes what it took")
    yield (
        "overrides",
        of(lambda: contract.check_overrides(contract.all_overrides()), "every overridden method fits"),
    )
    yield (
        "fingerprints",
        of(contract.check_fingerprints, "the code that frees streaming slots is as recorded"),
    )
    yield "attributes", of(contract.check_attributes, "every SGLang attribute read exists")
    yield "hooks", check_hooks
    yield "registries", check_registries


def check_hooks() -> str:
    """Load the plug-in as a scheduler and an HTTP process do, and see every hook in place."""
    os.environ[ACTIVE_VARIABLE] = "1"
    from sglang.srt.plugins import load_plugins

    from lt_sglang.hooks import table
    from lt_sglang.upstream.hook import check_applied, check_target

    problems = [problem for hook in table.HOOKS if (problem := check_target(hook))]
    if problems:
        raise DoctorError("; ".join(problems))
    load_plugins()
    check_applied(table.SCHEDULER_HOOKS)
    table.install_in_launcher()
    return f"{len(table.HOOKS)} hooks applied"


def check_registries() -> str:
    """After check_hooks: the backend and the prefix cache are known under our name."""
    attention = importlib.import_module("sglang.srt.layers.attention.attention_registry")
    radix = importlib.import_module("sglang.srt.mem_cache.registry")
    choices = importlib.import_module("sglang.srt.arg_groups.choices")
    places = {
        "attention backends": attention.ATTENTION_BACKENDS,
        "radix cache backends": radix.registered_radix_cache_backends(),
        "choices of --attention-backend": choices.ATTENTION_BACKEND_CHOICES,
    }
    missing = [place for place, names in places.items() if BACKEND not in names]
    if missing:
        raise DoctorError(f"{BACKEND} is missing among SGLang's {', '.join(missing)}")
    return f"{BACKEND} is registered with SGLang"


def _emit(*fields: object) -> None:
    print(_MARK + "|".join(str(field) for field in fields), flush=True)


if __name__ == "__main__":
    child_main(sys.argv[1], sys.argv[2:])
