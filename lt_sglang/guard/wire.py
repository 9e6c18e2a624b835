"""What the scheduler would say of a message, asked before it is sent.

The tokenizer's process sends structs whose fields nobody has checked; the scheduler decodes them by their
types and ends where one does not fit. Here the same bytes are made and decoded first.
"""

from __future__ import annotations

import copy
import functools
import re
import typing
from typing import Any

import msgspec

# Fields that are checked elsewhere, because they are large or are wrapped later.
LEFT_OUT = ("input_ids", "input_embeds", "mm_inputs", "positional_embed_overrides", "time_stats")


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError unless ``value`` would arrive as a ``hint``; ``name`` is for the message."""
    from sglang.srt.utils.msgpack_utils import enc_hook

    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(value, enc_hook=enc_hook), type=hint)
    except (msgspec.MsgspecError, TypeError, OverflowError, UnicodeError, RecursionError) as error:
        raise ValueError(f"{name}: {_readable(str(error))}") from None


def check_message(message: Any) -> None:
    """Raise ValueError, naming the field, unless the scheduler could read ``message``."""
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    replica = copy.copy(message)
    for name in LEFT_OUT:
        if hasattr(replica, name):
            setattr(replica, name, None)
    try:
        msgpack_decode(msgpack_encode(replica))
    except (msgspec.MsgspecError, TypeError, OverflowError, UnicodeError, RecursionError) as error:
        raise ValueError(f"{_field(message, str(error))}: {_readable(str(error))}") from None


@functools.cache
def hints(struct: type) -> dict[str, Any]:
    """The types of a struct's fields, by name."""
    return typing.get_type_hints(struct, include_extras=True)


def _field(message: Any, error: str) -> str:
    """The field an error is about: msgspec counts positions, ``$[7][2]``, the first being the tag."""
    found = re.search(r"`\$\[(\d+)\](?:\[(\d+)\])?", error)
    if found is None:
        return "request"
    names = type(message).__struct_fields__
    position = int(found.group(1)) - 1
    if not 0 <= position < len(names):
        return "request"
    name = names[position]
    inner = getattr(getattr(message, name), "__struct_fields__", None)
    if inner is None or found.group(2) is None or int(found.group(2)) >= len(inner):
        return str(name)
    return f"{name}.{inner[int(found.group(2))]}"


def _readable(error: str) -> str:
    """An error of msgspec's without the position, which means nothing to a client."""
    return re.sub(r" - at `\$[^`]*`", "", error)[:200]
