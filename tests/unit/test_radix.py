"""lt_sglang.cache.radix_static over SGLang's tree, allocator and requests: sinks are kept, windows let go."""

from __future__ import annotations

from array import array
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from lt_sglang.cache import factory
from lt_sglang.cache.radix_dynamic import DynamicRadixCache
from lt_sglang.cache.radix_static import LightTransferRadixCache
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.kv_keys import request_id
from lt_sglang.memory.sinks import SinkStore
from tests.property.cpu import Sizes, request
from tests.property.scheduler import INTERVAL, Scheduler

LONG = list(range(100, 130))  # several windows
OTHER = list(range(200, 230))


def run(scheduler: Scheduler, *requests: Req, until: Any = None) -> None:
    """Serve ``requests``, until all are over or ``until`` holds."""
    for req in requests:
        scheduler.submit(req)
    for _ in range(300):
        if scheduler.idle or (until is not None and until()):
            return
        scheduler.step()
        scheduler.check()
    raise AssertionError("it never came to it")


def key(tokens: list[int], extra_key: str | None = None, salt: str | None = None) -> RadixKey:
    return RadixKey(array("q", tokens), extra_key, cache_salt=salt)


def hit(scheduler: Scheduler, tokens: list[int], **names: Any) -> int:
    """Cached tokens that our cache would give a prompt."""
    return scheduler.caches.tree.match_prefix(MatchPrefixParams(key=key(tokens, **names))).device_prefix_len


def stock_hit(scheduler: Scheduler, tokens: list[int]) -> int:
    params = MatchPrefixParams(key=key(tokens))
    return UnifiedRadixCache.match_prefix(scheduler.caches.tree, params).device_prefix_len


def test_a_long_prefix_is_a_hit_while_its_sinks_are_stored() -> None:
    scheduler = Scheduler(Sizes())
    run(scheduler, request("a", LONG))
    assert hit(scheduler, LONG + [99]) == len(LONG)
    result = scheduler.caches.tree.match_prefix(MatchPrefixParams(key=key(LONG + [99])))
    assert result.last_device_node != scheduler.caches.tree.root_node_handle()


@pytest.mark.parametrize("asks", [True, False])
def test_who_asks_is_told_its_layers_at_its_end(asks: bool) -> None:
    """Where no token is sampled, nothing was told before."""
    scheduler = Scheduler(Sizes())
    req = request("a", LONG)
    req.sampling_params.custom_params = {"lighttransfer": asks}
    run(scheduler, req)
    found = (req.customized_info or {}).get("lighttransfer")
    assert found == ([scheduler.caches.tree.describe(req)] if asks else None)


def test_a_hit_whose_sinks_are_gone_is_a_miss() -> None:
    """Its window is there, its first tokens are not; what needs no sinks still is a hit."""
    scheduler = Scheduler(Sizes(sets=1))
    run(scheduler, request("a", LONG))
    run(scheduler, request("b", OTHER))
    assert scheduler.caches.sinks.stats.evicted == 1
    assert stock_hit(scheduler, LONG) == len(LONG), "SGLang alone would take it"
    missed = scheduler.caches.tree.match_prefix(MatchPrefixParams(key=key(LONG)))
    assert missed.device_prefix_len == 0
    assert missed.last_device_node == scheduler.caches.tree.root_node_handle()
    assert hit(scheduler, OTHER) == len(OTHER)
    run(scheduler, request("c", LONG))
    assert hit(scheduler, LONG) == len(LONG) and hit(scheduler, OTHER) == 0


def test_a_hit_no_longer_than_the_window_needs_no_sinks() -> None:
    sizes = Sizes(sets=1)
    scheduler = Scheduler(sizes)
    window = sizes.config.retained_tokens - 1
    run(scheduler, request("a", LONG[:window], output=1))
    run(scheduler, request("b", OTHER))
    assert hit(scheduler, LONG[:window] + [99]) == window
    longer = Scheduler(sizes)
    run(longer, request("a", LONG[: window + 1], output=1))
    assert longer.caches.sinks.stats.captured == 1, "one token more, and position 0 may be dropped"


@pytest.mark.parametrize("length", [20, Sizes().config.lazy_tokens - 2, 1])
@pytest.mark.parametrize("own", [6, 30])
def test_the_third_that_begins_alike_has_a_hit(length: int, own: int) -> None:
    """A shared system prompt: SGLang keeps a window where the second parts from the first.

    Also one shorter than sinks and window, and whatever is left behind it: in dynamic mode neither is shared
    (test_dynamic_radix.py).
    """
    # Whole prompts: where a chunk ends a window is kept too.
    scheduler = Scheduler(Sizes(units=600, chunk=80))
    trunk = LONG[:length]
    for name, tail, found in (("a", 1, 0), ("b", 2, 0), ("c", 3, length), ("d", 4, length)):
        prompt = trunk + [tail] * own
        assert hit(scheduler, prompt) == found, name
        req = request(name, prompt, output=12)
        run(scheduler, req, until=lambda req=req: req in scheduler.running)
        assert getattr(req, "lighttransfer_prefix", 0) == found, "what it was admitted with"
        run(scheduler)


def test_a_hit_keeps_its_sinks_from_being_evicted() -> None:
    """What is looked up was used last."""
    scheduler = Scheduler(Sizes(sets=2))
    run(scheduler, request("a", LONG))
    run(scheduler, request("b", OTHER))
    assert hit(scheduler, LONG) == len(LONG)
    run(scheduler, request("c", list(range(30))))
    assert hit(scheduler, LONG) == len(LONG) and hit(scheduler, OTHER) == 0


def test_sinks_that_go_between_match_and_admission_are_an_error() -> None:
    scheduler = Scheduler(Sizes())
    run(scheduler, request("a", LONG))
    late = request("b", LONG + [99])
    late.init_next_round_input(scheduler.caches.tree)
    assert late.prefix_len == len(LONG)
    scheduler.caches.sinks.clear()
    with pytest.raises(RuntimeError, match="the sinks of its cached prefix are gone"):
        scheduler.caches.tree.prefix_device_indices(late)


def test_a_request_that_was_admitted_finds_its_sinks_whatever_is_evicted() -> None:
    """SGLang evicts in the pass that admits, for a request of lower priority that it preempts."""
    scheduler = Scheduler(Sizes(sets=1))
    run(scheduler, request("a", LONG))
    tree, sinks = scheduler.caches.tree, scheduler.caches.sinks
    late = request("b", LONG + [99])
    late.init_next_round_input(tree)
    assert tree.bring_sinks(late, nullcontext)
    sinks.trim(keep=0)
    taken = sinks.capture("c", ("c",), lambda: None, lambda: torch.zeros(2, dtype=torch.int64))
    assert not taken and sinks.stats.evicted == 0, "a window goes on without a set rather than in their place"
    assert len(tree.prefix_device_indices(late)) == len(LONG)
    sinks.release(request_id(late))
    sinks.settle()
    sinks.trim(keep=0)
    assert sinks.used == 0


@pytest.mark.parametrize("names", [{"extra_key": "k"}, {"cache_salt": "s"}])
def test_another_tenant_has_sinks_of_its_own(names: dict[str, str]) -> None:
    scheduler = Scheduler(Sizes())
    run(scheduler, request("a", LONG), request("b", LONG, **names))
    assert scheduler.caches.sinks.stats.captured == 2 and scheduler.caches.sinks.used == 2
    mine = Scheduler(Sizes())
    run(mine, request("a", LONG, **names))
    key, salt = names.get("extra_key"), names.get("cache_salt")
    assert hit(mine, LONG, extra_key=key, salt=salt) == len(LONG) and hit(mine, LONG) == 0


def test_the_same_beginning_shares_one_set() -> None:
    scheduler = Scheduler(Sizes())
    run(scheduler, request("a", LONG), request("b", LONG[:9] + [7] * 20))
    assert scheduler.caches.sinks.used == 1 and scheduler.caches.sinks.stats.shared == 1


def test_sinks_of_a_prompt_shorter_than_they_are_include_its_output() -> None:
    """Two prompts of one token that go on alike share them; those that do not, do not."""
    sizes = Sizes(sink=4, recent=5)
    scheduler = Scheduler(sizes)
    one = request("a", [1], output=20)
    run(scheduler, one)
    first = [1, *one.output_ids[:3]]
    assert hit(scheduler, [1, *one.output_ids]) == 20, "all but the last token's K and V are there"
    assert scheduler.caches.tree._sinks_of(key([*first, 9])) in scheduler.caches.sinks


def test_the_prompts_window_is_let_go_once_the_output_fills_one() -> None:
    """Else a request holds two windows to its end, and long outputs do not fit."""
    sizes = Sizes()
    scheduler, window = Scheduler(sizes), sizes.config.retained_tokens - 1
    req = request("a", LONG, output=24)
    tree, allocator = scheduler.caches.tree, scheduler.caches.allocator
    run(scheduler, req, until=lambda: req.decode_batch_idx == window)
    assert tree.swa_protected_size() == window, "not yet: its first queries still read it"
    run(scheduler, until=lambda: req.decode_batch_idx == window + INTERVAL + 1)
    assert tree.swa_protected_size() == 0
    held = allocator.swa_attn_allocator.used - tree.swa_evictable_size()
    assert held <= window + INTERVAL + 1


def test_a_request_without_a_set_keeps_its_first_tokens_and_stays_out_of_the_tree() -> None:
    scheduler = Scheduler(Sizes(sets=1, units=320))
    first, second = request("a", LONG, output=40), request("b", OTHER, output=10)
    run(scheduler, first, until=lambda: first in scheduler.running)
    run(scheduler, second, until=lambda: second.decode_batch_idx == 8)
    assert scheduler.caches.sinks.stats.refused >= 1 and first in scheduler.running
    assert second.kv.cache_protected_len == 0
    _, streaming = scheduler._slots(second, len(OTHER))
    assert (streaming[: scheduler.caches.sizes.sink] > 0).all()
    run(scheduler)
    assert hit(scheduler, OTHER) == 0 and hit(scheduler, LONG) == len(LONG)


def test_a_lock_is_kept_while_the_sinks_have_no_set() -> None:
    """A short cached prefix is locked; its first tokens are read from there until a set holds them."""
    scheduler = Scheduler(Sizes(sets=1, units=320))
    run(scheduler, request("s", OTHER[:4], output=1))
    first, second = request("a", LONG, output=24), request("b", OTHER[:5], output=20)
    run(scheduler, first, until=lambda: first in scheduler.running)
    run(scheduler, second, until=lambda: second.decode_batch_idx == 12)
    assert second.lock is not None and not second.lock.swa_released
    scheduler.caches.tree.release_swa_prefix_lock(second)
    assert not second.lock.swa_released
    run(scheduler)


def test_without_a_tree_the_window_slides_between_chunks() -> None:
    sizes = Sizes(disable=True)
    scheduler, req = Scheduler(sizes), request("a", LONG, output=1)
    scheduler.submit(req)
    held = []
    while not scheduler.idle:
        scheduler.step()
        scheduler.check()
        held.append(scheduler.caches.allocator.swa_attn_allocator.used)
    assert held[-1] == 0 and max(held) <= sizes.config.retained_tokens + sizes.chunk


def test_who_has_finished_is_counted_once_and_health_checks_are_not() -> None:
    scheduler = Scheduler(Sizes())
    tree = scheduler.caches.tree
    run(scheduler, request("a", LONG), request("b", LONG[:3]), request("HEALTH_CHECK_1", [1, 2]))
    assert tree.finished_requests == 2
    req = request("c", OTHER, output=20)
    run(scheduler, req, until=lambda: req in scheduler.running)
    scheduler.retract(req)
    assert tree.finished_requests == 2, "it comes back"
    assert scheduler.caches.sinks.requests == 0
    tree.next_check = 9.0
    run(scheduler)
    assert tree.next_check == 0.0, "an idle scheduler looks at the stores at once"
    assert tree.finished_requests == 3 and req.finished_reason != FINISH_ABORT
    assert isinstance(req.finished_reason, FINISH_LENGTH)


def test_reset_forgets_the_sinks_that_nobody_uses() -> None:
    scheduler = Scheduler(Sizes())
    run(scheduler, request("a", LONG))
    assert scheduler.caches.sinks.used == 1
    scheduler.caches.clear()
    assert scheduler.caches.sinks.used == 0 and hit(scheduler, LONG) == 0


def test_sanity_check_reports_a_fault_of_the_sinks_and_of_the_tree() -> None:
    scheduler = Scheduler(Sizes())
    run(scheduler, request("a", LONG))
    scheduler.caches.tree.sanity_check()
    scheduler.caches.sinks._free.pop()
    scheduler.caches.sinks._free.pop()
    with pytest.raises(RuntimeError, match="sink sets are lost or doubled"):
        scheduler.caches.tree.sanity_check()


def test_a_request_that_comes_back_is_the_same_and_a_used_id_is_not() -> None:
    one, two = request("r", [1]), request("r", [1])
    assert request_id(one) == request_id(one) != request_id(two)
    assert request_id(one).startswith("r@")


def test_without_a_window_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    store = SinkStore(1, 1, 1, "cpu", SimpleNamespace(page_size=1))  # type: ignore[arg-type]
    allocator = SimpleNamespace()
    monkeypatch.setattr(LightTransferRadixCache, "token_to_kv_pool_allocator", allocator, raising=False)
    for window in (None, 0):
        monkeypatch.setattr(UnifiedRadixCache, "__init__", lambda self, params: None)
        monkeypatch.setattr(LightTransferRadixCache, "sliding_window_size", window)
        with pytest.raises(LightTransferError, match="need a sliding window"):
            LightTransferRadixCache(SimpleNamespace(), store)  # type: ignore[arg-type]
    monkeypatch.setattr(LightTransferRadixCache, "sliding_window_size", 1)
    LightTransferRadixCache(SimpleNamespace(), store)  # type: ignore[arg-type]


def test_which_cache_a_server_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own without lazy layers, else ours, by mode."""
    built: list[Any] = []

    def stock(ctx: Any, cache_class: Any = UnifiedRadixCache) -> Any:
        built.append((ctx, cache_class))
        return "cache"

    monkeypatch.setattr(factory, "create_unified_radix_cache", stock)
    for kind in (LightTransferRadixCache, DynamicRadixCache):
        monkeypatch.setattr(kind, "__init__", lambda self, *given: setattr(self, "given", given))
    runner = SimpleNamespace(prefills=None, lt_config=Sizes().config, flush_sinks="flush")
    ctx: Any = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    assert factory.create(ctx) == "cache" and built.pop() == (ctx, UnifiedRadixCache)
    runner.sink_store = None
    assert factory.create(ctx) == "cache" and built.pop() == (ctx, UnifiedRadixCache)
    runner.sink_store = "store"
    params: Any = object.__new__(CacheInitParams)
    assert factory.create(ctx) == "cache"
    given_ctx, build = built.pop()
    made = build(params)
    assert given_ctx is ctx and type(made) is LightTransferRadixCache and made.given[:2] == (params, "store")
    assert made.flush_sinks == "flush"
    runner.prefills, runner.full_rows = "prefills", "rows"
    factory.create(ctx)
    made = built.pop()[1](params)
    assert type(made) is DynamicRadixCache and made.given == (params, "store", "prefills", "rows")
