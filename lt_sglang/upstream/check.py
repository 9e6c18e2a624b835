"""Compare the installed SGLang with what was recorded. Used by ``lt-sglang doctor`` and tests/contract.

Everything returns sentences about what is wrong; an empty list is good news.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lt_sglang.upstream.attributes import ATTRIBUTES
from lt_sglang.upstream.recorded import FINGERPRINTS, SIGNATURES

# Modules with classes that extend SGLang's.
SUBCLASS_MODULES = (
    "lt_sglang.model_runner",
    "lt_sglang.memory.allocator",
    "lt_sglang.memory.budget",
    "lt_sglang.memory.host",
    "lt_sglang.memory.pools",
    "lt_sglang.cache.host_stack",
    "lt_sglang.cache.radix_static",
    "lt_sglang.memory.weights",
    "lt_sglang.cache.radix_dynamic",
    "lt_sglang.attention.static_torch",
    "lt_sglang.attention.dynamic_torch",
    "lt_sglang.attention.static_flashinfer",
    "lt_sglang.attention.static_plans",
    "lt_sglang.attention.dynamic_flashinfer",
    "lt_sglang.attention.dynamic_decode",
)

_PREFIXES: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Override:
    """A method of ours and the one of SGLang's it replaces; ``target`` is the latter's dotted name."""

    ours: str
    target: str
    function: Callable[..., Any]
    stock: Callable[..., Any]


def signature_text(function: Callable[..., Any]) -> str:
    """Parameters without types and values: ``self, req, *, up_to, retain=, **kwargs``."""
    parts: list[str] = []
    star = False
    for parameter in inspect.signature(inspect.unwrap(function)).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        star = star or parameter.kind is inspect.Parameter.VAR_POSITIONAL
        default = "" if parameter.default is inspect.Parameter.empty else "="
        parts.append(f"{_PREFIXES.get(parameter.kind, '')}{parameter.name}{default}")
    return ", ".join(parts)


def fingerprint(function: Callable[..., Any]) -> str:
    """Twelve hex digits of a function's source, blind to blank lines and comment lines."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    lines = [line.rstrip() for line in source.splitlines()]
    kept = [line for line in lines if line and not line.lstrip().startswith("#")]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:12]


def subclasses(module: ModuleType) -> Iterator[type]:
    """The classes of one of our modules that extend one of SGLang's."""
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__ and _stock_bases(value):
            yield value


def overrides(cls: type) -> Iterator[Override]:
    """The methods ``cls`` defines that one of its SGLang bases defines too, constructors included."""
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if not inspect.isfunction(function) or (name.startswith("__") and name != "__init__"):
            continue
        for base in _stock_bases(cls):
            stock = vars(base).get(name)
            if stock is None:
                continue
            if isinstance(stock, (classmethod, staticmethod)):
                stock = stock.__func__
            if callable(stock):
                target = f"{base.__module__}.{base.__qualname__}.{name}"
                yield Override(f"{cls.__name__}.{name}", target, function, stock)
            break


def all_overrides() -> list[Override]:
    """Every override of every module of ours."""
    modules = [importlib.import_module(name) for name in SUBCLASS_MODULES]
    return [override for module in modules for cls in subclasses(module) for override in overrides(cls)]


def check_signatures() -> list[str]:
    """Recorded functions that are gone or take other parameters."""
    wrong = []
    for target, expected in SIGNATURES.items():
        try:
            found = signature_text(pkgutil.resolve_name(target))
        except (ImportError, AttributeError) as error:
            wrong.append(f"{target} does not exist in this SGLang ({error})")
            continue
        if found != expected:
            wrong.append(f"{target} takes ({found}), recorded is ({expected})")
    return wrong


def check_overrides(found: list[Override]) -> list[str]:
    """Overrides that are not recorded, or that do not take what SGLang may pass."""
    wrong = []
    for override in found:
        if override.target not in SIGNATURES:
            text = signature_text(override.stock)
            wrong.append(
                f"{override.ours} overrides {override.target}, which is not recorded; read it, then add "
                f'"{override.target}": "{text}" to lt_sglang/upstream/recorded.py'
            )
        if not override.ours.endswith(".__init__") and (problem := _incompatible(override)):
            wrong.append(f"{override.ours} {problem}")
    return wrong


def check_fingerprints() -> list[str]:
    """Functions we depend on line by line that changed since a person read them."""
    wrong = []
    for target, (expected, why) in FINGERPRINTS.items():
        try:
            found = fingerprint(pkgutil.resolve_name(target))
        except (ImportError, AttributeError, OSError) as error:
            wrong.append(f"{target} cannot be read in this SGLang ({error})")
            continue
        if found != expected:
            wrong.append(
                f"{target} changed (fingerprint {found}, recorded {expected}). Read it again: {why} Then "
                "record the new fingerprint in lt_sglang/upstream/recorded.py"
            )
    return wrong


def check_attributes() -> list[str]:
    """Attributes we read of SGLang's and FlashInfer's objects that their sources no longer name."""
    wrong = []
    for owner, names in ATTRIBUTES.items():
        try:
            cls = pkgutil.resolve_name(owner)
        except (ImportError, AttributeError) as error:
            wrong.append(f"{owner} does not exist in this SGLang ({error})")
            continue
        wrong += [f"{owner} has no attribute {name}" for name in names if not has_attribute(cls, name)]
    return wrong


def has_attribute(cls: type, name: str) -> bool:
    """Whether instances of ``cls`` have ``name``: a member, a field, or set on self in its source."""
    for base in cls.__mro__:
        if base is object:
            continue
        if name in vars(base) or name in vars(base).get("__annotations__", {}):
            return True
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        if f"self.{name} = " in source or f"self.{name}: " in source:
            return True
    return False


def _stock_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__[1:] if base.__module__.partition(".")[0] == "sglang"]


def _incompatible(override: Override) -> str | None:
    """Why a call that fits SGLang's method would not fit ours, or None."""
    ours = list(inspect.signature(override.function).parameters.values())
    stock = list(inspect.signature(inspect.unwrap(override.stock)).parameters.values())
    if len(stock) > 1 and all(parameter.kind in _VARIADIC for parameter in stock[1:]):
        return None  # a placeholder, which says nothing of what is passed
    args = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in ours)
    kwargs = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in ours)
    named = {parameter.name: parameter for parameter in ours if parameter.kind not in _VARIADIC}
    for parameter in stock:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            swallowed = args
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            swallowed = kwargs
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            swallowed = kwargs or parameter.name in named
        else:
            swallowed = (args and kwargs) or parameter.name in named
        if not swallowed:
            return f"does not take {parameter.name}, which {override.target} takes"
    stock_order = [parameter.name for parameter in stock if parameter.kind in _POSITIONAL]
    order = [parameter.name for parameter in ours if parameter.kind in _POSITIONAL]
    if order != stock_order[: len(order)]:
        return f"takes {order} in another order than {override.target}: {stock_order}"
    known = {parameter.name for parameter in stock}
    extra = [p.name for p in named.values() if p.name not in known and p.default is inspect.Parameter.empty]
    return f"requires {extra[0]}, which {override.target} does not take" if extra else None
