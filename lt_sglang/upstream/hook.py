"""One wrapped function of SGLang's: what is expected of it, and whether calls reach our wrapper."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lt_sglang.errors import LightTransferError


@dataclass(frozen=True)
class Hook:
    """target: dotted name. parameters: the names it takes, in order.

    in_scheduler: needed in the schedulers and the detokenizer. in_launcher: in the process that starts them,
    takes requests, and checks them; the HTTP server's or an Engine's.
    """

    target: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    why: str
    delete_when: str
    in_scheduler: bool = True
    in_launcher: bool = False


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


def check_applied(hooks: Iterable[Hook]) -> None:
    """Raise LightTransferError unless our wrapper of every hook is in place in this process.

    Others may wrap the same function, inside or outside of ours.
    """
    for hook in hooks:
        if not applied(hook):
            raise LightTransferError(
                f"hooks: {hook.target} is not wrapped in this process; the log says why above; "
                "run lt-sglang doctor"
            )


def applied(hook: Hook) -> bool:
    """Whether calls of the hook's target reach our wrapper in this process."""
    return any(_calls(layer, hook.wrapper) for layer in _layers(pkgutil.resolve_name(hook.target)))


def _layers(function: Any) -> Iterator[Any]:
    """``function`` and what it wraps, from the outside in."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__wrapped__", None)


def _calls(layer: Any, wrapper: Callable[..., Any]) -> bool:
    """Whether ``layer`` is the function that SGLang's registry makes around ``wrapper``.

    The registry keeps the hook in a closure and leaves no other trace of it on the function.
    """
    cells = getattr(layer, "__closure__", None) or ()
    return any(_content(cell) is wrapper for cell in cells)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None
