"""The functions that put the guard around SGLang's; lt_sglang/hooks/table.py says which and why.

Those of a launcher's process leave the requests of a stock engine in it alone. ``hide_source`` and
``auth_level`` do not know the server, and do it no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lt_sglang import guard
from lt_sglang.guard import requests, tokenized
from lt_sglang.guard.stop_regex import MOST_TOKENS
from lt_sglang.guard.texts import Reader
from lt_sglang.names import is_requested

# Compiled grammars that a scheduler keeps. One that the guard lets pass takes up to 50 MB for 49,000 tokens.
MOST_GRAMMARS = 128


def normalize_request(original: Callable[[Any], None], obj: Any) -> None:
    """Check a request of /generate, and of every route that makes one."""
    if getattr(obj, "lt_guarded", False):
        requests.normalize(original, obj)
    else:
        original(obj)


def generate_request(original: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> Any:
    """Remember whose request it is; a process may have a stock engine besides."""
    obj.lt_guarded = guard.is_on() and is_requested(manager.server_args)
    if request is not None and obj.lt_guarded:
        obj.lt_reader = Reader(manager.tokenizer, manager.context_len, manager.allow_auto_truncate)
    return original(manager, obj, request)


def create_tokenized(original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Check a request once more, tokenized, before it can be sent."""
    made = original(manager, obj, *args, **kwargs)
    if guard.is_on() and is_requested(manager.server_args):
        limits = getattr(manager, "lt_limits", None)
        if limits is None:
            limits = manager.lt_limits = limits_of(manager)
        tokenized.check_tokenized(limits, obj, made)
        _bound_stops(getattr(made, "sampling_params", None), limits.vocab_size)
    return made


def _bound_stops(params: Any, vocab_size: int) -> None:
    """Stop at what can come alone, and search the end of a long answer alone.

    A token outside the vocabulary never comes. But where any request of the batch has min_new_tokens, SGLang
    writes to its place among the logits, and the scheduler ends.
    """
    if getattr(params, "stop_regex_strs", None):
        params.stop_regex_max_len = min(params.stop_regex_max_len, MOST_TOKENS)
    if getattr(params, "stop_token_ids", None):
        params.stop_token_ids = {token for token in params.stop_token_ids if 0 <= token < vocab_size}


def limits_of(manager: Any) -> tokenized.Limits:
    """The limits that this server's requests are checked with."""
    from sglang.srt.runtime_context import get_memory, get_observability, get_schedule

    model = manager.model_config
    allowed = get_observability().tokenizer_metrics_allowed_custom_labels
    return tokenized.Limits(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        takes_embeds=str(model.dtype) == "torch.bfloat16",
        pooling=bool(get_memory().disable_radix_cache) and get_schedule().chunked_prefill_size == -1,
        labels=frozenset(allowed or ()) if manager.enable_metrics else None,
        context_length=manager.context_len,
    )


def refuse_expert_recording(original: Callable[[Any], Any], manager: Any) -> Any:
    """Start, stop or dump a record of experts only where there is a recorder."""
    from sglang.srt.runtime_context import get_exec

    if (
        guard.is_on()
        and is_requested(manager.server_args)
        and get_exec().moe.expert_distribution_recorder_mode is None
    ):
        raise _bad_request("no record of experts is kept; start with --expert-distribution-recorder-mode")
    return original(manager)


def refuse_memory_release(original: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> Any:
    """Memory is not given back: the memory saver is refused with lazy layers."""
    if guard.is_on() and is_requested(manager.server_args):
        raise _bad_request(
            "memory cannot be given back; --enable-memory-saver does not work with lazy layers"
        )
    return original(manager, obj, request)


def _bad_request(sentence: str) -> Exception:
    from fastapi import HTTPException

    return HTTPException(status_code=400, detail=sentence)


def set_grammar(original: Callable[..., None], backend: Any, key: tuple[str, str], value: Any) -> None:
    """Keep at most that many compiled grammars, the same ones on every rank; SGLang never drops one."""
    if len(backend.cache) >= MOST_GRAMMARS and key not in backend.cache:
        backend.reset()
        inner = getattr(backend, "grammar_backend", None)  # of one that waits for the end of reasoning
        if inner is not None:
            inner.reset()
    original(backend, key, value)


def clear_session_node(original: Callable[..., None], node: Any, req_dict: dict[str, Any]) -> None:
    """End a request of a session and all that follow it, whatever their number.

    Not by SGLang's own recursion, which ends the scheduler after some hundred turns. A name used twice has
    one entry for two requests; the second may be gone by now.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    waiting = [node]
    while waiting:
        one = waiting.pop()
        waiting += one.children
        if one.req.finished_reason is None:
            one.req.to_finish = FINISH_ABORT()
        req_dict.pop(one.req.rid, None)


def abort_family(original: Callable[..., None], manager: Any, rid: str = "", abort_all: bool = False) -> None:
    """End the request of this name, or those that SGLang made of it."""
    state = manager.rid_to_state.get(rid)
    whole = abort_all or not rid or (state is not None and state.dispatched)
    if whole or not is_requested(manager.server_args):
        original(manager, rid, abort_all)
        return
    found = False
    for name, state in list(manager.rid_to_state.items()):
        family = getattr(state.obj, "lt_families", {}).get(rid)
        if family is None:
            continue
        found = True
        # Samples are sent after their shared prefix; those that are not there yet follow (see below).
        family.aborted = True
        if state.dispatched:
            original(manager, name, False)
    if not found:
        original(manager, rid, abort_all)


def note_dispatched(original: Callable[..., None], manager: Any, rid: str) -> None:
    """A request is with the scheduler; end it if it was aborted on its way."""
    original(manager, rid)
    state = manager.rid_to_state.get(rid)
    families = getattr(state.obj, "lt_families", {}) if state is not None else {}
    if any(family.aborted for family in families.values()):
        manager.abort_request(rid)


def abort_exactly(original: Callable[..., None], scheduler: Any, recv_req: Any) -> None:
    """End the request of this name and no other whose name begins with it."""
    if recv_req.abort_all or not recv_req.rid:
        original(scheduler, recv_req)
        return
    with _renamed(list(_longer_names(scheduler, recv_req.rid))):
        original(scheduler, recv_req)


def _longer_names(scheduler: Any, rid: str) -> Iterator[Any]:
    seen: set[int] = set()
    waiting = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
    for req in [scheduler.chunked_req, *waiting, *scheduler.collect_inflight_reqs()]:
        if req is not None and id(req) not in seen and req.rid != rid and req.rid.startswith(rid):
            seen.add(id(req))
            yield req


@contextmanager
def _renamed(reqs: list[Any]) -> Iterator[None]:
    """Put a character before the names of ``reqs`` meanwhile, so that SGLang's prefix does not match them."""
    for req in reqs:
        req.rid = "\0" + req.rid
    try:
        yield
    finally:
        for req in reqs:
            req.rid = req.rid[1:]


def hide_source(original: Callable[[Any], str], error: Any) -> str:
    """FastAPI ends the text of a validation error, which clients read, with file, line and function."""
    return ""


def auth_level(original: Callable[..., Any], app: Any, scope: dict[str, Any]) -> Any:
    """SGLang's level of a route, also of routes that a router brought, which it takes for anybody's."""
    from sglang.srt.utils.auth import AuthLevel

    level = original(app, scope)
    if level != AuthLevel.NORMAL:
        return level
    return next((found for found in _inner_levels(app.router.routes, scope) if found is not None), level)


def _inner_levels(routes: Any, scope: dict[str, Any]) -> Iterator[Any]:
    from starlette.routing import Match

    for route in routes:
        router = getattr(route, "original_router", None)
        if router is not None:
            yield from _inner_levels(router.routes, scope)
        elif route.matches(scope)[0] == Match.FULL:
            # What is mounted, such as /metrics, is an application and has no endpoint.
            yield getattr(getattr(route, "endpoint", None), "_auth_level", None)


def admit_alike(original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep prompts of vectors and of tokens in batches of their own; the other kind waits its turn."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    first = next(iter(adder.can_run_list), None)
    if first is not None and (first.input_embeds is None) != (req.input_embeds is None):
        return AddReqResult.OTHER
    return original(adder, req, *args, **kwargs)
