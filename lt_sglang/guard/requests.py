"""A request as it came from a route, before SGLang fills in its defaults and splits its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lt_sglang.guard.grammar import check_grammars
from lt_sglang.guard.stop_regex import check_stop_regex
from lt_sglang.guard.texts import Reader
from lt_sglang.guard.wire import check_value, hints

# Answers that one request may ask for, n times its prompts. Each is a request of its own inside the server.
MOST_ANSWERS = 4096
# Prompts that come in one request over HTTP. SGLang sends them off one by one, and answers nobody meanwhile.
MOST_PROMPTS = 4096
# Tokens that stop_token_ids or logit_bias may name; no vocabulary has so many.
MOST_NAMED = 1 << 19
# Set by the server itself; a client that sends one reaches into another process.
INTERNAL = ("http_worker_ipc", "lora_id")
# SGLang reads these in ways of its own before they are sent; what it makes of them is checked later.
READ_BY_SGLANG = ("stop_token_ids", "watermark")
# What SGLang makes of the others; sent by a client, they pass by its checks.
MADE_BY_SGLANG = ("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized")
# What SGLang raises where the parts of a request do not fit together.
MISFIT = (TypeError, AttributeError, IndexError, KeyError, AssertionError, OverflowError)


@dataclass
class Family:
    """The requests inside the server that one name stands for.

    aborted: the name was aborted before all of them were sent.
    """

    aborted: bool = False


def normalize(original: Callable[[Any], None], obj: Any) -> None:
    """Check, let SGLang normalize, and note which requests belong together.

    Raises:
        ValueError: with a sentence that names the field.
    """
    check_request(obj)
    name = obj.rid if isinstance(obj.rid, str) else None
    try:
        original(obj)
        members = [obj] if obj.is_single else [obj[index] for index in range(len(obj.rid))]
    except MISFIT as error:
        raise ValueError(
            "the fields of this request do not fit together; a list must have one entry a prompt "
            f"({type(error).__name__}: {error})"
        ) from None
    mark(members, name)


def mark(members: list[Any], name: str | None) -> None:
    """Remember the names of each request: its own, and the one a client gave to all of them.

    SGLang copies these objects where it sends one prompt n times, under names of its own.
    """
    shared = {} if name is None else {name: Family()}
    for member in members:
        member.lt_families = {member.rid: Family(), **shared}


def check_request(obj: Any) -> None:
    """Raise ValueError for what SGLang would stumble over while it reads the request."""
    for name in INTERNAL:
        if getattr(obj, name, None) is not None:
            raise ValueError(f"{name}: is set by the server; leave it out")
    _check_rid(obj)
    _check_text(obj.text)
    _check_client(obj, getattr(obj, "lt_reader", None))
    for params in _sampling_params(obj.sampling_params):
        check_sampling_params(params)
    _check_answers(obj)
    _check_session(getattr(obj, "session_params", None))
    _check_overrides(obj.positional_embed_overrides)


def check_sampling_params(params: dict[str, Any]) -> None:
    """Raise ValueError unless every value has the type SGLang will send it as."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    for name in ("stop_token_ids", "logit_bias"):
        if isinstance(params.get(name), (list, dict)) and len(params[name]) > MOST_NAMED:
            raise ValueError(f"sampling_params.{name}: has {len(params[name])} entries; at most {MOST_NAMED}")
    types = {name: hint for name, hint in hints(SamplingParams).items() if name not in MADE_BY_SGLANG}
    for name, value in params.items():
        if name not in types:
            raise ValueError(f"sampling_params: {name!r} is not one; allowed are {', '.join(sorted(types))}")
        if value is not None and name not in READ_BY_SGLANG:
            check_value(f"sampling_params.{name}", value, types[name])
    _check_token_list("sampling_params.stop_token_ids", params.get("stop_token_ids"))
    patterns = params.get("stop_regex")
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        check_stop_regex(pattern)
    check_grammars(params)


def _sampling_params(given: Any) -> Iterator[dict[str, Any]]:
    for params in given if isinstance(given, list) else [given]:
        if params is None and not isinstance(given, list):
            continue
        if not isinstance(params, dict):
            raise ValueError("sampling_params: must be an object, or a list with one object a prompt")
        yield params
    if given == []:
        raise ValueError("sampling_params: is an empty list; one object a prompt is allowed, or none at all")


def _check_answers(obj: Any) -> None:
    first = obj.sampling_params[0] if isinstance(obj.sampling_params, list) else obj.sampling_params
    answers = 1 if first is None or first.get("n") is None else first["n"]
    if answers < 1:
        raise ValueError(f"n: must be at least 1, got {answers}")
    prompts = _prompts(obj)
    if answers > 1 and answers * prompts > MOST_ANSWERS:
        raise ValueError(
            f"n: {answers} answers to {prompts} prompts; at most {MOST_ANSWERS} answers a request are allowed"
        )


def _prompts(obj: Any) -> int:
    if obj.text is not None:
        return len(obj.text) if isinstance(obj.text, list) else 1
    several = obj.input_ids and isinstance(obj.input_ids[0], list)
    return len(obj.input_ids) if several else 1


def _check_client(obj: Any, reader: Reader | None) -> None:
    """What a program that holds the engine itself may do and a client, beside others, may not."""
    if reader is None:
        return
    name = "input_ids" if obj.text is None else "text"
    prompts = _prompts(obj)
    if prompts > MOST_PROMPTS:
        raise ValueError(f"{name}: {prompts} prompts; at most {MOST_PROMPTS} a request are allowed")
    for text in obj.text if isinstance(obj.text, list) else [obj.text]:
        if isinstance(text, str):
            reader.check("text", text)


def _check_rid(obj: Any) -> None:
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    rids = obj.rid if isinstance(obj.rid, list) else [obj.rid]
    for rid in rids:
        if rid is None and not isinstance(obj.rid, list):
            continue
        if not isinstance(rid, str):
            raise ValueError("rid: must be a string, or a list with one string a prompt")
        check_value("rid", rid, str)
        # A busy scheduler drops health checks without an answer. /health sends one token and logs nothing.
        if rid.startswith(HEALTH_CHECK_RID_PREFIX) and (obj.log_metrics or obj.input_ids != [0]):
            raise ValueError(f"rid: names that begin with {HEALTH_CHECK_RID_PREFIX} are the server's own")


def _check_text(text: Any) -> None:
    if isinstance(text, str):
        # A lone surrogate, which JSON can write and UTF-8 cannot.
        check_value("text", text, str)
    elif isinstance(text, list):
        for part in text:
            if not isinstance(part, (str, list)):
                raise ValueError("text: must be a string or a list of strings")
            _check_text(part)


def _check_session(session: dict[str, Any] | None) -> None:
    from sglang.srt.managers.io_struct import SessionParams

    types = hints(SessionParams)
    for name, value in (session or {}).items():
        if name not in types:
            raise ValueError(f"session_params: {name!r} is not one; allowed are {', '.join(sorted(types))}")
        check_value(f"session_params.{name}", value, types[name])


def _check_token_list(name: str, tokens: Any) -> None:
    if tokens is None:
        return
    if not isinstance(tokens, (list, tuple, set, frozenset)):
        raise ValueError(f"{name}: must be a list of token ids")
    for token in tokens:
        if token is None:
            continue
        try:
            int(token)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name}: {token!r} is not a token id") from None


def _check_overrides(overrides: Any) -> None:
    from sglang.srt.managers.embed_types import PositionalEmbeds

    for item in overrides if isinstance(overrides, list) else [overrides]:
        if item is not None and not isinstance(item, PositionalEmbeds):
            raise ValueError(
                "positional_embed_overrides: cannot be sent over HTTP; use embed_overrides of /v1/embeddings "
                "or query_embed_overrides and item_embed_overrides of /v1/score"
            )
