"""cache/radix_dynamic.py over SGLang's tree, allocator and requests: sets are name spaces of the cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from lt_sglang.cache.radix_dynamic import NOWHERE, TRIES, DynamicRadixCache
from lt_sglang.memory.kv_keys import request_id
from tests.property.cpu import Sizes, request
from tests.property.scheduler import Scheduler
from tests.unit.test_radix import hit, key, run

SIZES = Sizes(dynamic=True, units=420)
AT_ONCE = Sizes(dynamic=True, units=420, chunk=80)
BLOCK = SIZES.config.lazy_tokens
LONG = list(range(100, 130))
OTHER = list(range(200, 230))


class Found(NamedTuple):
    """What SGLang's tree has of a prefix."""

    device_prefix_len: int
    host_hit_length: int = 0
    swa_host_hit_length: int = 0
    swa_branching_seqlen: int | None = None


def match(scheduler: Scheduler, tokens: list[int], req: Any = None) -> Any:
    return scheduler.caches.tree.match_prefix(MatchPrefixParams(key=key(tokens), req=req))


def sets(scheduler: Scheduler) -> Any:
    assert scheduler.caches.prefills is not None
    return scheduler.caches.prefills.sets


def test_a_prefix_is_found_with_the_set_it_was_written_for() -> None:
    scheduler = Scheduler(SIZES)
    first, again = request("a", LONG), request("b", LONG + [1, 2])
    run(scheduler, first)
    (entry,) = sets(scheduler).find(scheduler.caches.tree._prompt_start(key(LONG)))
    run(scheduler, again, until=lambda: again in scheduler.running)
    assert sets(scheduler).of(request_id(again)) is entry and again.cached_tokens == 0
    assert sets(scheduler).stats.inherited == 1 and sets(scheduler).stats.decided == 1
    run(scheduler)


def test_less_than_the_first_block_is_a_miss() -> None:
    """However much of it is in the tree."""
    scheduler = Scheduler(SIZES)
    run(scheduler, request("a", LONG[: BLOCK + 1], output=1))
    assert hit(scheduler, LONG[: BLOCK + 1] + OTHER) == BLOCK + 1
    assert hit(scheduler, LONG[: BLOCK - 1] + OTHER) == 0
    found = match(scheduler, LONG[: BLOCK - 1] + OTHER)
    assert found.last_device_node == scheduler.caches.tree.root_node_handle(NOWHERE)


@pytest.mark.parametrize("found", [BLOCK - 1, BLOCK])
def test_what_is_left_of_a_prefix_must_cover_the_first_block(
    monkeypatch: pytest.MonkeyPatch, found: int
) -> None:
    """The rest may have been evicted: what the request then computes would be for other layers."""
    scheduler = Scheduler(SIZES)
    run(scheduler, request("a", LONG))
    asked: Any = request("b", LONG)

    def left(self: Any, params: Any) -> Found:
        here = 0 if params.key.extra_key == NOWHERE else found
        return Found(here)

    monkeypatch.setattr(UnifiedRadixCache, "match_prefix", left)
    assert match(scheduler, LONG, asked).device_prefix_len == (found if found == BLOCK else 0)
    assert (asked.lighttransfer_hit[0] is None) == (found < BLOCK)


def test_short_prompts_share_the_default_set_only() -> None:
    scheduler = Scheduler(SIZES)
    run(scheduler, request("a", LONG), request("s", OTHER[:BLOCK], output=1))
    assert hit(scheduler, OTHER[: BLOCK - 1]) == BLOCK - 1
    assert hit(scheduler, OTHER[:2]) == 2, "a short prompt needs no whole block"
    assert hit(scheduler, LONG[:BLOCK]) == 0
    assert hit(scheduler, OTHER[:BLOCK] + [1]) == 0, "a longer one has layers of its own"


def test_what_was_evicted_is_looked_for_in_the_next_set() -> None:
    """The set that agrees longest has lost its K and V; another that begins alike has not."""
    scheduler = Scheduler(AT_ONCE)
    one, two = request("a", LONG), request("b", LONG)
    run(scheduler, one, two)
    found = [entry.uid for entry in sets(scheduler).find(scheduler.caches.tree._prompt_start(key(LONG)))]
    assert len(found) == 2, "decided at the same time, each for itself"
    tree = scheduler.caches.tree
    given: Any = request("asking", LONG)
    match(scheduler, LONG, given)
    assert given.lighttransfer_hit[0].uid == found[0]
    stock = UnifiedRadixCache.match_prefix
    gone = f"lt:{found[0]}:"

    def without(self: Any, params: Any) -> Any:
        if params.key.extra_key == gone:
            return tree.tree_core.empty_match_result
        return stock(self, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnifiedRadixCache, "match_prefix", without)
        assert match(scheduler, LONG, given).device_prefix_len == len(LONG)
        assert given.lighttransfer_hit[0].uid == found[1]
        patch.setattr(UnifiedRadixCache, "match_prefix", lambda *_: tree.tree_core.empty_match_result)
        assert match(scheduler, LONG, given).device_prefix_len == 0
        assert given.lighttransfer_hit == (None, None)


@pytest.mark.parametrize("listed", [False, True])
def test_with_a_list_the_third_that_begins_alike_has_a_hit(listed: bool) -> None:
    """The first keeps no window where others will part from it; the second does, as it sees where that is.

    Without a list each has its own layers selected, however many begin alike.
    """
    scheduler = Scheduler(Sizes(dynamic=True, listed=listed, units=420, chunk=80))
    trunk = LONG[:20]
    for name, tail, found in (("a", 1, 0), ("b", 2, 0), ("c", 3, len(trunk)), ("d", 4, len(trunk))):
        prompt = trunk + [tail] * 6
        assert hit(scheduler, prompt) == (found if listed else 0), name
        run(scheduler, request(name, prompt, output=BLOCK + 4))
    stats = sets(scheduler).stats
    assert (stats.decided, stats.inherited) == ((2, 2) if listed else (4, 0))
    assert hit(scheduler, trunk[:12] + [0] * 6) == 0, "no window there yet"
    longer = trunk + [9] * (BLOCK + 1)
    assert hit(scheduler, longer) == 0, "what is longer than a window gets full attention of its own"
    assert hit(scheduler, longer[:-1]) == (len(trunk) if listed else 0)


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK])
def test_a_beginning_shorter_than_the_first_block_is_never_shared(length: int) -> None:
    """However many requests come with it; in static mode it is (test_radix.py)."""
    scheduler = Scheduler(Sizes(dynamic=True, listed=True, units=420, chunk=80))
    for number in range(4):
        prompt = LONG[:length] + [number] * 6
        assert hit(scheduler, prompt) == (length if number > 1 and length == BLOCK else 0), number
        run(scheduler, request(f"r{number}", prompt, output=BLOCK + 4))
    assert sets(scheduler).stats.inherited == (2 if length == BLOCK else 0)


def test_a_hit_where_prompts_part_is_found_behind_many_others() -> None:
    """Long rests behind the same beginning have sets of their own, which were used since."""
    scheduler = Scheduler(Sizes(dynamic=True, listed=True, units=900, layer_sets=24, chunk=80))
    trunk = LONG[:20]
    for name, rest in (("a", [1] * 6), ("b", [2] * 6)):
        run(scheduler, request(name, trunk + rest, output=BLOCK + 4))
    for number in range(2 * TRIES):
        longer = trunk + [10 + number] * (BLOCK + 4)
        run(scheduler, request(f"long{number}", longer, output=BLOCK + 4))
    assert sets(scheduler).stats.inherited == 0
    assert hit(scheduler, trunk + [3] * 6) == len(trunk)


def test_without_a_tree_nothing_is_left_for_others() -> None:
    scheduler = Scheduler(Sizes(dynamic=True, listed=True, units=420, chunk=80, disable=True))
    trunk = LONG[:20]
    run(scheduler, request("a", trunk + [1] * 6, output=1))
    asked: Any = request("b", trunk + [2] * 6)
    match(scheduler, trunk + [2] * 6, asked)
    assert scheduler.caches.tree.chunk_limit(asked) is None


def test_no_more_than_a_few_sets_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(Sizes(dynamic=True, units=560, layer_sets=20, rows=8, chunk=80))
    run(scheduler, *[request(f"r{n}", LONG[:10] + [n], output=1) for n in range(8)])
    tried: list[str] = []

    def count(self: Any, params: Any) -> Any:
        tried.append(params.key.extra_key)
        return self.tree_core.empty_match_result

    monkeypatch.setattr(UnifiedRadixCache, "match_prefix", count)
    match(scheduler, LONG[:10] + [99])
    assert len(set(tried)) == len(tried) == TRIES + 1 and tried[-1] == NOWHERE
    assert tried[:-1] == [f"lt:{uid}:" for uid in (8, 7, 6, 5)], "the last used first"


def test_a_key_is_left_as_it_was() -> None:
    scheduler = Scheduler(SIZES)
    run(scheduler, request("a", LONG, extra_key="k"))
    for tokens in (LONG, OTHER, LONG[:3]):
        asked = key(tokens, "k")
        scheduler.caches.tree.match_prefix(MatchPrefixParams(key=asked))
        assert asked.extra_key == "k"
        scheduler.caches.tree.touch_prefix(asked)
        assert asked.extra_key == "k"
    assert hit(scheduler, LONG, extra_key="k") == len(LONG) and hit(scheduler, LONG) == 0
    assert hit(scheduler, LONG, extra_key="k", salt="s") == 0


def test_a_request_keeps_its_own_extra_key() -> None:
    scheduler = Scheduler(SIZES)
    req = request("a", LONG, output=20, extra_key="k")
    run(scheduler, req, until=lambda: req in scheduler.running)
    assert req.extra_key == "k"
    run(scheduler)
    assert req.extra_key == "k"


@pytest.mark.parametrize("owner", [None, "tenant"])
def test_touching_keeps_what_waits_from_being_evicted(owner: str | None) -> None:
    """In the name space of the set that will be tried first."""
    scheduler = Scheduler(SIZES)
    run(scheduler, request("a", LONG, output=1, extra_key=owner))
    run(scheduler, request("b", OTHER, output=1))
    scheduler.caches.tree.touch_prefix(key(LONG, owner))
    scheduler.evict(len(OTHER), 0)
    assert hit(scheduler, LONG, extra_key=owner) == len(LONG) and hit(scheduler, OTHER) == 0
    scheduler.caches.tree.touch_prefix(key(list(range(30))))  # of nobody
    scheduler.caches.tree.touch_prefix(key(LONG[:3]))


def test_an_undecided_request_stays_out_of_the_tree() -> None:
    scheduler = Scheduler(SIZES)
    req = request("a", LONG, output=1)
    run(scheduler, req, until=lambda: req.extend_end == 20)
    assert scheduler.caches.prefills is not None
    assert scheduler.caches.prefills.staged == request_id(req) and hit(scheduler, LONG) == 0
    assert req.kv.cache_protected_len == 0
    _, streaming = scheduler._slots(req, 20)
    assert streaming.all(), "any layer may turn out full, so all keep all"
    assert scheduler.caches.sinks.used == 0
    run(scheduler)
    assert hit(scheduler, LONG) == len(LONG)


def test_the_window_slides_once_the_request_is_decided() -> None:
    """In the same step: its banks hold what they did, its lazy layers need their window alone."""
    scheduler = Scheduler(SIZES)
    req = request("a", LONG, output=20)
    run(scheduler, req, until=lambda: req in scheduler.running and len(req.output_ids) > 0)
    _, streaming = scheduler._slots(req, len(LONG))
    window = SIZES.config.retained_tokens - 1
    assert streaming[-window:].all() and not streaming[: -window - 1].any()
    assert scheduler.caches.sinks.used == 1
    run(scheduler)


def test_the_sinks_of_a_request_are_kept_once_it_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied from its slots, where the popped layers have them by then."""
    scheduler = Scheduler(SIZES)
    sinks, taken = scheduler.caches.sinks, []
    capture = sinks.capture

    def spy(name: str, key: Any, row: Any, slots: Any, **more: Any) -> bool:
        entry = sets(scheduler).of(name)
        assert entry is not None and entry.known
        taken.append(slots().tolist())
        return capture(name, key, row, slots, **more)

    monkeypatch.setattr(sinks, "capture", spy)
    run(scheduler, request("long", LONG, output=1))
    assert taken and all(all(slots) for slots in taken)
    taken.clear()
    run(scheduler, request("short", [1], output=20))
    assert taken and all(all(slots) for slots in taken)


def test_sinks_belong_to_a_layer_set() -> None:
    scheduler = Scheduler(AT_ONCE)
    run(scheduler, request("a", LONG), request("b", LONG))
    assert scheduler.caches.sinks.stats.captured == 2


def test_who_asks_is_told_the_layers_once() -> None:
    scheduler = Scheduler(SIZES)
    asks, other = request("a", LONG, asks=True), request("b", OTHER)
    run(scheduler, asks, other)
    assert asks.customized_info is not None
    (told,) = asks.customized_info["lighttransfer"]
    assert told["origin"] == "prompt" and set(told) == {"lazy_layers", "laziness", "origin"}
    assert not other.customized_info
    again = request("c", LONG, asks=True)
    run(scheduler, again)
    assert again.customized_info is not None
    assert again.customized_info["lighttransfer"][0]["origin"] == "prefix"
    short = request("s", LONG[:3], asks=True)
    run(scheduler, short)
    assert short.customized_info is not None
    assert short.customized_info["lighttransfer"][0]["origin"] == "default"


@pytest.mark.parametrize("asked", [None, [], "lighttransfer", {"lighttransfer": False}, {"other": 1}])
def test_whatever_a_client_sends_is_no_question(asked: Any) -> None:
    scheduler = Scheduler(SIZES)
    req = request("a", LONG)
    req.sampling_params.custom_params = asked
    run(scheduler, req)
    assert not req.customized_info


def test_what_others_report_stays() -> None:
    scheduler = Scheduler(SIZES)
    req = request("a", LONG, asks=True)
    req.customized_info = {"mine": [1]}
    run(scheduler, req)
    assert req.customized_info["mine"] == [1] and "lighttransfer" in req.customized_info


def test_finished_requests_are_counted_by_their_layers_and_health_checks_are_not() -> None:
    scheduler = Scheduler(SIZES)
    req = request("a", LONG, output=20)
    run(scheduler, req, request("b", OTHER), request("HEALTH_CHECK_1", [1]))
    sets(scheduler).flush()
    assert sets(scheduler).scored.read()[-1] == 2
    again = request("c", LONG, output=20)
    run(scheduler, again, until=lambda: again in scheduler.running)
    scheduler.retract(again)
    sets(scheduler).flush()
    assert sets(scheduler).scored.read()[-1] == 2, "it is not over"
    run(scheduler)


def test_reset_forgets_the_sets() -> None:
    scheduler = Scheduler(SIZES)
    run(scheduler, request("a", LONG))
    assert sets(scheduler).stored == 1
    scheduler.caches.clear()
    assert sets(scheduler).stored == 0 and hit(scheduler, LONG) == 0


def test_sanity_check_reports_a_fault_of_the_layer_sets() -> None:
    scheduler = Scheduler(SIZES)
    run(scheduler, request("a", LONG))
    tree = scheduler.caches.tree
    assert isinstance(tree, DynamicRadixCache)
    tree.sanity_check()
    sets(scheduler)._free.pop()
    with pytest.raises(RuntimeError, match="layer sets are lost or doubled"):
        tree.sanity_check()
    sets(scheduler)._free.append(1)
    scheduler.caches.sinks._free.clear()
    with pytest.raises(RuntimeError, match="sink sets are lost or doubled"):
        tree.sanity_check()
