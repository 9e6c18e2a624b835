"""Everything a user of SGLang can set: server arguments, fields of requests, headers, variables."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import sglang

SRT = Path(sglang.__file__).parent / "srt"
# Where a variable that is read may change K and V, who runs when, or what attention sees.
OF_CONCERN = ("mem_cache", "managers", "model_executor", "layers/attention")
VARIABLE = re.compile(r"SGLANG_[A-Z0-9_]*[A-Z0-9]")
# Bodies that no route names in its signature, because it reads them by hand or they are part of another.
HIDDEN_BODIES = (
    "sglang.srt.sampling.sampling_params.SamplingParams",
    "sglang.srt.entrypoints.openai.protocol.TranscriptionRequest",
    "sglang.srt.managers.io_struct.SessionParams",
)


def surface() -> dict[str, set[str]]:
    """The names of every section of verdicts.toml."""
    return {
        "server_args": server_args(),
        "requests": request_fields(),
        "headers": headers(),
        "environment": declared_variables() | variables_of_concern(),
    }


def server_args() -> set[str]:
    """The fields of ServerArgs."""
    from sglang.srt.arg_groups.arg_utils import field_names
    from sglang.srt.server_args import ServerArgs

    return set(field_names(ServerArgs))


def request_fields() -> set[str]:
    """``Model.field`` of every body that a route of SGLang's HTTP server takes."""
    import pkgutil

    from sglang.srt.entrypoints.http_server import app

    models = {pkgutil.resolve_name(name) for name in HIDDEN_BODIES}
    for route in app.routes:
        endpoint = getattr(route, "endpoint", None)
        if endpoint is not None:
            for hint in typing.get_type_hints(endpoint).values():
                models |= {part for part in (hint, *typing.get_args(hint)) if _fields(part)}
    return {f"{model.__name__}.{field}" for model in models for field in _fields(model)}


def headers() -> set[str]:
    """Headers that override fields of a request."""
    from sglang.srt.entrypoints.request_headers import _HEADER_OVERRIDES

    return set(_HEADER_OVERRIDES)


def declared_variables() -> set[str]:
    """SGLANG_* in SGLang's own list."""
    from sglang.srt.environ import Envs

    return {name for name in vars(Envs) if VARIABLE.fullmatch(name)}


@cache
def variables_of_concern() -> set[str]:
    """SGLANG_* that code in OF_CONCERN reads, declared or not."""
    files = (file for folder in OF_CONCERN for file in (SRT / folder).rglob("*.py"))
    return {name for file in files for name in _read_in(file.read_text(encoding="utf-8"))}


def _read_in(source: str) -> Iterator[str]:
    if "SGLANG_" not in source:
        return
    for node in ast.walk(ast.parse(source)):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
        if isinstance(node, ast.Attribute | ast.Constant) and VARIABLE.fullmatch(str(name)):
            yield str(name)


def _fields(model: Any) -> list[str]:
    if not inspect.isclass(model):
        return []
    if dataclasses.is_dataclass(model):
        return [field.name for field in dataclasses.fields(model)]
    found = getattr(model, "model_fields", None) or getattr(model, "__struct_fields__", ())
    return [name for name in found if isinstance(name, str)]
