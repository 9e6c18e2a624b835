"""The functions that wrap SGLang's. Each does nothing unless its server asked for lazy layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lt_sglang.config import CONFIG_KEY, LightTransferConfig
from lt_sglang.names import HIDDEN, KEYS, is_requested

CHECK_SECONDS = 1.0


def init_model_runner(original: Callable[[Any], None], worker: Any, check_hooks: Callable[[], None]) -> None:
    """Build LightTransferModelRunner where SGLang builds ModelRunner, unless ``check_hooks`` raises."""
    if not is_requested(worker.server_args):
        original(worker)
        return
    check_hooks()
    import sglang.srt.model_executor.model_runner as module

    from lt_sglang.model_runner import LightTransferModelRunner

    given = getattr(worker.model_config.hf_config, CONFIG_KEY)
    config = LightTransferConfig.from_dict(given)

    def build(*args: Any, **kwargs: Any) -> LightTransferModelRunner:
        return LightTransferModelRunner(*args, lt_config=config, **kwargs)

    # The original looks the class up in its module as it runs; this thread builds one worker at a time.
    stock = module.ModelRunner
    module.ModelRunner = build
    try:
        original(worker)
    finally:
        module.ModelRunner = stock


def forward_batch(original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Tell our model runner which requests are in a batch before it runs."""
    begin = getattr(worker.model_runner, "begin_batch", None)
    if begin is not None and batch is not None:
        begin(batch)
    return original(worker, batch, *args, **kwargs)


def select_admission(
    original: Callable[..., Any],
    adder: Any,
    req: Any,
    *args: Any,
    has_chunked_req: bool = False,
    **kwargs: Any,
) -> Any:
    """Price ``req`` in units, and let a retracted request's chunk end where its cache says."""
    bring = getattr(adder.tree_cache, "bring_sinks", None)
    if bring is not None and not bring(req, lambda: adder._lock_node(req.best_match_node, lock_host=True)):
        from sglang.srt.managers.schedule_policy import AddReqResult

        return AddReqResult.NO_TOKEN
    _consider(adder, req, (kwargs.get("host_hit_length", 0), kwargs.get("swa_host_hit_length", 0)))
    return _up_to_limit(
        adder,
        req,
        has_chunked_req,
        lambda: original(adder, req, *args, has_chunked_req=has_chunked_req, **kwargs),
    )


def add_ignore_eos(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """As ``select_admission``, where SGLang admits by another rule."""
    _consider(adder, req)
    return _up_to_limit(adder, req, getattr(adder, "lt_chunk_follows", False), lambda: original(adder, req))


def add_chunk(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """As ``select_admission``, for the next chunk of a request that has begun."""
    _consider(adder, req)
    limit = _chunk_limit(adder, req)
    if limit is not None:
        adder.rem_chunk_tokens = limit
    unfinished = original(adder, req)
    adder.lt_chunk_follows = unfinished is not None
    return unfinished


def running_offset(original: Callable[..., float], adder: Any, req: Any) -> float:
    """What a decoding request will take of memory that full and lazy layers share."""
    from lt_sglang.memory.allocator import ElasticAllocator
    from lt_sglang.memory.budget import running_offset as offset

    allocator = adder.token_to_kv_pool_allocator
    if not isinstance(allocator, ElasticAllocator):
        return original(adder, req)
    return offset(req, adder.new_token_ratio, allocator)


def _consider(adder: Any, req: Any, on_host: tuple[int, int] = (0, 0)) -> None:
    consider = getattr(adder.memory_budget, "consider", None)
    if consider is not None:
        consider(req, adder, on_host)


def _up_to_limit(adder: Any, req: Any, has_chunked_req: bool, admit: Callable[[], Any]) -> Any:
    from sglang.srt.managers.schedule_policy import AddReqResult

    limit = _chunk_limit(adder, req)
    if (has_chunked_req or adder.new_chunked_req is not None) and (limit is not None or _is_cut(adder)):
        return AddReqResult.OTHER  # SGLang keeps track of one request between chunks
    if limit is None:
        return admit()
    given = adder.rem_chunk_tokens
    adder.rem_chunk_tokens = limit  # the chunk is then the batch's last
    result = admit()
    if result in (AddReqResult.OTHER, AddReqResult.NO_TOKEN) and adder.new_chunked_req is not req:
        adder.rem_chunk_tokens = given
    return result


def _is_cut(adder: Any) -> bool:
    """Whether the request that the budget considers would be cut into chunks.

    SGLang counts on an unfinished chunk to have used up the pass. Ours may have ended for want of memory, and
    a preemption or an eviction since then makes room.
    """
    most = adder.rem_chunk_tokens
    return most is not None and getattr(adder.memory_budget, "extend_tokens", 0) > most


def _chunk_limit(adder: Any, req: Any) -> int | None:
    """Most tokens of the request's chunk, if SGLang might take more and chunks prompts at all."""
    ask = getattr(adder.tree_cache, "chunk_limit", None)
    limit = None if ask is None or adder.rem_chunk_tokens is None else ask(req)
    return limit if limit is not None and limit <= adder.rem_chunk_tokens else None


def slide_after_chunk(original: Callable[[Any, Any], None], req: Any, tree_cache: Any) -> None:
    """Let a request's windows slide after every chunk of its prefill, published or not."""
    original(req, tree_cache)
    slide = getattr(tree_cache, "slide_window", None)
    if slide is not None:
        slide(req)


def abort_stuck(original: Callable[[Any], list[Any]], scheduler: Any) -> list[Any]:
    """End the request without which the queue could move; SGLang tells it to all ranks."""
    aborts = original(scheduler)
    if getattr(scheduler.tree_cache, "sinks", None) is None:
        return aborts
    watch = getattr(scheduler, "lt_watch", None)
    if watch is None:
        from lt_sglang.hooks.queue_watch import QueueWatch

        watch = scheduler.lt_watch = QueueWatch()
    return [*aborts, *watch.look(scheduler)]


def run_http_server(
    original: Callable[..., Any],
    server_args: Any,
    tokenizer_manager: Any,
    *args: Any,
    execute_warmup_func: Callable[[Any], bool] | None = None,
    **kwargs: Any,
) -> Any:
    """Serve nobody but the server's own warm-up before it is ready, and no body that is too much for it."""
    from sglang.srt.entrypoints import http_server

    from lt_sglang.guard import bodies
    from lt_sglang.launch.gate import guard

    warm_up = execute_warmup_func
    if is_requested(server_args):
        bodies.put(http_server.app, tokenizer_manager)
        warm_up = guard(http_server.app, tokenizer_manager, execute_warmup_func)
    return original(server_args, tokenizer_manager, *args, execute_warmup_func=warm_up, **kwargs)


def add_state(original: Callable[..., None], controller: Any, state: dict[str, Any]) -> None:
    """Add ``lighttransfer`` to what /server_info reports of a scheduler."""
    original(controller, state)
    runner = controller.scheduler.tp_worker.model_runner
    if hasattr(runner, "lt_config"):
        state[CONFIG_KEY] = runner.describe()


def check_pools(
    original: Callable[..., tuple[bool, list[str]]], checker: Any, *args: Any, **kwargs: Any
) -> Any:
    """Add the stores of sinks and layer sets to SGLang's idle leak check: after requests, and once a second.

    An idle scheduler checks in every round, and takes requests between rounds. The stores' check goes through
    all sets, which is several times the rest of a round.
    """
    leak, messages = original(checker, *args, **kwargs)
    cache, now = checker.tree_cache, time.monotonic()
    sinks = getattr(cache, "sinks", None)
    if sinks is None or now < cache.next_check:
        return leak, messages
    cache.next_check = now + CHECK_SECONDS
    wrong = sinks.check_integrity()
    prefills = getattr(cache, "prefills", None)
    if prefills is not None:
        wrong += prefills.sets.check_integrity()
    return leak or bool(wrong), [*messages, *wrong]


def publish_metrics(original: Callable[..., None], reporter: Any, is_idle: bool, event_ns: int) -> None:
    """Publish the ``lt_*`` metrics beside SGLang's own, where those are on (--enable-metrics)."""
    original(reporter, is_idle=is_idle, event_ns=event_ns)
    if not reporter.enable_metrics:
        return
    ticker = getattr(reporter, "lt_ticker", None)
    if ticker is None:
        from lt_sglang.metrics import ticker_for

        ticker = reporter.lt_ticker = ticker_for(reporter)
    ticker.tick(is_idle)


def hide_keys(original: Callable[[Any], dict[str, Any]], args: Any) -> dict[str, Any]:
    """Leave keys and passwords out of the server arguments that /server_info and the log show."""
    shown = original(args)
    if not is_requested(args):
        return shown
    return shown | {name: HIDDEN for name in KEYS if shown.get(name)}


def skip_pynccl_on_cpu(original: Callable[..., None], communicator: Any, *args: Any, **kwargs: Any) -> None:
    """On a CPU, leave a communicator that says it is not available."""
    import torch

    if torch.cuda.is_available():
        original(communicator, *args, **kwargs)
        return
    communicator.available = False
    communicator.disabled = True
