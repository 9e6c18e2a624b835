"""lt_sglang.memory.allocator: two kinds of slots and sink sets over one list of units."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lt_sglang.errors import LightTransferError
from lt_sglang.memory.units import UnitShape
from tests.pools import ONE_EACH, Pools, make_pools

from .life_rig import Rig

SHAPES = [
    UnitShape(1, 1),
    UnitShape(2, 2),
    UnitShape(1, 3),
    UnitShape(3, 1),
    UnitShape(2, 3),
    UnitShape(0, 2),
]


def pools(units: int = 120, shape: UnitShape = ONE_EACH, page: int = 1, **given: Any) -> Pools:
    if not shape.full_units:
        given.setdefault("full_limit", 400)
    return make_pools(units, 8, 4, requests=4, context=512, shape=shape, page_size=page, **given)


def extend(made: Pools, lengths: list[tuple[int, int]], last: list[int]) -> torch.Tensor | None:
    """Slots for requests that grow from one length to another; last: the slot of their last token, or -1."""
    before, after = (torch.tensor(part) for part in zip(*lengths, strict=True))
    found: torch.Tensor | None = made.allocator.alloc_extend(
        before, before, after, after, torch.tensor(last), int((after - before).sum())
    )
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_has_a_slot_of_each_kind_and_units_of_its_own(shape: UnitShape) -> None:
    made = pools(shape=shape)
    allocator, both = made.allocator, shape.full_units + shape.streaming_units
    slots = allocator.alloc(10)
    assert slots is not None and slots.dtype == torch.int64 and len(set(slots.tolist())) == 10
    assert len(made.allocator.units) == 120 - 10 * both
    streaming = allocator.full_to_swa_index_mapping[slots]
    assert (streaming > 0).all() and len(set(streaming.tolist())) == 10
    assert (allocator.full_used, allocator.swa_attn_allocator.used) == (10, 10)
    rows = allocator.swa_attn_allocator.rows_in_parts(streaming).flatten().tolist()
    if shape.full_units:
        rows += allocator.full_attn_allocator.rows_in_parts(slots).flatten().tolist()
    assert len(set(rows)) == 10 * both and not set(rows) & set(allocator.units.free.tolist())
    allocator.free(slots)
    assert len(allocator.units) == 120 and not allocator.full_to_swa_index_mapping[slots].any()
    assert allocator.full_used == allocator.swa_attn_allocator.used == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("page", [1, 16])
def test_what_is_said_to_be_available_can_be_had(shape: UnitShape, page: int) -> None:
    """However much of each kind is taken; and one page more cannot."""
    rng = random.Random(page)
    made = pools(60, shape, page)
    allocator = made.allocator
    for _ in range(12):
        allocator.clear()
        allocator.swa_attn_allocator.alloc(rng.randrange(0, 60 // shape.streaming_units // 2) * page)
        if shape.full_units:
            left = allocator.full_available_size() // page
            allocator.full_attn_allocator.alloc(rng.randrange(0, left // 2 + 1) * page)
        tokens = allocator.available_size()
        assert tokens % page == 0
        pages = tokens // page
        assert allocator.new_pages_available(pages, pages) and not allocator.new_pages_available(
            pages + 1, pages + 1
        )
        if page == 1:
            assert allocator.alloc(tokens + 1) is None
            assert allocator.alloc(tokens) is not None
        else:
            assert extend(made, [(0, tokens + 1)], [-1]) is None
            assert not tokens or extend(made, [(0, tokens)], [-1]) is not None
        assert allocator.available_size() == 0


def test_either_kind_may_have_all_units() -> None:
    made = pools(120, UnitShape(1, 3))
    allocator = made.allocator
    assert (allocator.full_available_size(), allocator.swa_available_size()) == (120, 40)
    assert (allocator.size_full, allocator.size_swa) == (120, 40)
    allocator.full_attn_allocator.alloc(60)
    assert (allocator.full_available_size(), allocator.swa_available_size()) == (60, 20)
    assert allocator.swa_capacity_and_available(full_capacity=0, swa_capacity=0) == ((120, 60), (20, 20))
    allocator.sinks.alloc(4)
    assert (allocator.full_available_size(), allocator.swa_available_size()) == (48, 16)
    assert allocator.swa_attn_allocator.used == 0, "sinks are counted by themselves"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_are_taken_once_per_page(shape: UnitShape) -> None:
    made = pools(60, shape, 16)
    allocator, both = made.allocator, shape.full_units + shape.streaming_units
    first = extend(made, [(0, 20), (0, 5)], [-1, -1])
    assert first is not None and len(allocator.units) == 60 - 3 * both
    one, two = first[:20], first[20:]
    assert (one % 16).tolist() == [position % 16 for position in range(20)]
    assert len(set((one // 16).tolist())) == 2
    streaming = allocator.full_to_swa_index_mapping[first]
    assert torch.equal(streaming % 16, first % 16), "a token is at the same place of both pages"
    # Both go on in their pages; decode takes a new one at a page's beginning only.
    more = extend(made, [(20, 30), (5, 16)], [int(one[-1]), int(two[-1])])
    assert more is not None and len(allocator.units) == 60 - 3 * both
    assert int(more[0]) == int(one[-1]) + 1
    lengths = torch.tensor([31, 17])
    new = allocator.alloc_decode(lengths, lengths, torch.tensor([int(more[9]), int(more[-1])]))
    assert new is not None and len(allocator.units) == 60 - 4 * both
    assert new.tolist()[0] == int(more[9]) + 1 and int(new[1]) % 16 == 0
    allocator.free(torch.cat((one, more[:10], new[:1])))
    allocator.free(torch.cat((two, more[10:], new[1:])))
    assert len(allocator.units) == 60


def test_the_window_is_let_go_and_the_rest_stays() -> None:
    made = pools(120, UnitShape(1, 3))
    allocator = made.allocator
    slots = allocator.alloc(10)
    allocator.free_swa_segment(slots[:6], start_pos=0)
    assert len(allocator.units) == 120 - 10 - 3 * 4
    assert (allocator.full_used, allocator.swa_attn_allocator.used) == (10, 4)
    assert allocator.full_to_swa_index_mapping[slots].bool().tolist() == [False] * 6 + [True] * 4
    allocator.free_segment(slots[6:], start_pos=6)
    allocator.free_full_segment(slots[:6], start_pos=0)
    assert len(allocator.units) == 120


@pytest.mark.parametrize("page", [1, 16])
def test_a_group_is_freed_at_its_end(page: int) -> None:
    made = pools(60, UnitShape(1, 2), page)
    allocator = made.allocator
    slots = allocator.alloc(8) if page == 1 else extend(made, [(0, 40)], [-1])
    assert slots is not None
    before = len(allocator.units)
    allocator.free_group_begin()
    allocator.free_swa_segment(slots[: 2 * page], start_pos=0)
    allocator.free_full_segment(slots[: 2 * page], start_pos=0)
    allocator.free_segment(slots[2 * page :], start_pos=2 * page)
    assert len(allocator.units) == before, "held back until the group ends"
    allocator.free_group_end()
    assert len(allocator.units) == 60 and allocator.full_used == allocator.swa_attn_allocator.used == 0


def test_more_given_back_than_taken_is_an_error() -> None:
    made = pools()
    slots = made.allocator.sinks.alloc(2)
    made.allocator.sinks.free_segment(slots, start_pos=0)
    with pytest.raises(AssertionError, match="more slots freed than there are in use"):
        made.allocator.sinks.free_segment(slots, start_pos=0)


def test_a_limit_of_full_slots() -> None:
    """--max-total-tokens counts full slots in use; streaming ones are not limited."""
    made = pools(200, full_limit=30)
    allocator = made.allocator
    assert allocator.full_is_limited and allocator.size_full == allocator.available_size() == 30
    slots = allocator.alloc(30)
    assert slots is not None and allocator.alloc(1) is None and len(allocator.units) == 140
    assert allocator.swa_available_size() == 140
    allocator.free(slots[:5])
    assert allocator.available_size() == 5
    assert not pools().allocator.full_is_limited
    assert pools(60, page=16, full_limit=50).allocator.size_full == 48


def test_positions_where_no_layer_is_full() -> None:
    for page in (1, 16):
        made = pools(60, UnitShape(0, 2), page, full_limit=128)
        allocator = made.allocator
        assert allocator.size_full == 128 and allocator.full_used == 0
        slots = allocator.alloc(20) if page == 1 else extend(made, [(0, 20)], [-1])
        assert slots is not None
        assert (allocator.full_used, len(allocator.units)) == ((20, 40) if page == 1 else (32, 58))
        assert len(allocator.full_to_swa_index_mapping) == 128 + page + 1


def test_clear_frees_everything_and_needs_the_sinks_gone() -> None:
    made = pools()
    made.allocator.alloc(10)
    made.allocator.sinks.alloc(4)
    made.allocator.clear()
    assert len(made.allocator.units) == 120 and made.allocator.sinks.used == made.allocator.full_used == 0
    assert made.sinks.capture("a", ("a",), lambda: 1, lambda: torch.arange(1, 5))
    with pytest.raises(AssertionError, match="sink sets in use"):
        made.allocator.clear()
    with pytest.raises(LightTransferError, match="pools of a known size"):
        made.allocator.resize(SimpleNamespace(max_total_num_tokens=3))


class Tree:
    """What is cached, and what was asked to be evicted: a full token takes its streaming one along."""

    def __init__(self, made: Pools, full: int, streaming: int) -> None:
        self.allocator, self.asked = made.allocator, []
        self.slots = made.allocator.alloc(full)
        made.allocator.free_swa_segment(self.slots[: full - streaming], start_pos=0)
        self.full, self.streaming = full, streaming

    def supports_prefix_sharing(self) -> bool:
        return True

    def full_evictable_size(self) -> int:
        return self.full

    def swa_evictable_size(self) -> int:
        return self.streaming

    def evict_for_alloc(self, params: Any, allocation_reclaim_satisfied: Any) -> None:
        self.asked.append((params.num_tokens, params.swa_num_tokens))
        # Oldest first: those without a window, then those with one.
        while params.num_tokens > 0 and self.full and not allocation_reclaim_satisfied():
            bare = self.full > self.streaming
            self._drop(self.allocator.free_full_segment if bare else self.allocator.free_segment)
            self.full -= 1
            self.streaming -= 0 if bare else 1
            params.num_tokens -= 1
        while params.swa_num_tokens > 0 and self.streaming and not allocation_reclaim_satisfied():
            self.allocator.free_swa_segment(self.slots[:1], start_pos=0)
            self.streaming -= 1
            params.swa_num_tokens -= 1
            self.slots = self.slots.roll(-1)

    def _drop(self, free: Any) -> None:
        free(self.slots[:1], start_pos=0)
        self.slots = self.slots[1:]


def test_nothing_is_evicted_while_there_is_room() -> None:
    made = pools()
    tree = Tree(made, 20, 5)
    made.allocator.evict_to_free_tokens(tree, 40)
    assert tree.asked == []
    made.allocator.evict_to_free_tokens(None, 400)
    made.allocator.evict_to_free_tokens(SimpleNamespace(supports_prefix_sharing=lambda: False), 400)


@pytest.mark.parametrize(
    "shape", [UnitShape(1, 1), UnitShape(1, 3), UnitShape(3, 1), UnitShape(2, 3)], ids=str
)
def test_no_more_is_evicted_than_is_wanted(shape: UnitShape) -> None:
    both = shape.full_units + shape.streaming_units
    for wanted in (1, 2, 7, 15):
        made = pools(30 * both, shape)
        tree = Tree(made, 28, 6)
        made.allocator.evict_to_free_tokens(tree, wanted)
        assert made.allocator.available_size() >= wanted
        # Whoever would evict one token less would fall short.
        assert len(made.allocator.units) < wanted * both + both or not tree.asked, (wanted, tree.asked)


def test_streaming_slots_are_evicted_where_full_ones_do_not_do() -> None:
    made = pools(80, UnitShape(0, 2))
    tree = Tree(made, 50, 40)
    assert len(made.allocator.units) == 40
    made.allocator.evict_to_free_tokens(tree, 45)
    assert tree.asked == [(0, 5)] and made.allocator.available_size() == 45


def test_a_limit_is_met_by_eviction_though_units_are_free() -> None:
    made = pools(400, full_limit=30)
    tree = Tree(made, 28, 4)
    made.allocator.evict_to_free_tokens(tree, 10)
    assert tree.asked == [(8, 0)] and made.allocator.full_available_size() == 10


def fill_sets(made: Pools, count: int) -> None:
    for number in range(count):
        assert made.sinks.capture(f"r{number}", (number,), lambda: 1, lambda: torch.arange(1, 5))
        made.sinks.release(f"r{number}")


def test_sinks_of_nobody_go_before_what_is_cached_but_one_for_each_window() -> None:
    made = pools(120)
    tree = Tree(made, 30, 9)  # two windows of 8, the second begun
    fill_sets(made, 5)
    assert made.allocator.evictable_units(tree) == 30 + 9 + 5 * 4 and made.allocator.units_of_sinks == 4
    free = len(made.allocator.units)
    made.allocator.evict_to_free_tokens(tree, (free + 2) // 2)
    assert made.sinks.used == 4 and tree.asked == [], "one set was enough"
    made.allocator.evict_to_free_tokens(tree, (free + 12) // 2 + 1)
    assert made.sinks.used == 2 and tree.asked, "the rest comes from the cache"


def test_all_that_is_evictable_can_be_had() -> None:
    for shape in SHAPES[:5]:
        made = pools(200, shape)
        tree = Tree(made, 20, 8)
        fill_sets(made, 3)
        both = shape.full_units + shape.streaming_units
        tokens = (len(made.allocator.units) + made.allocator.evictable_units(tree)) // both
        made.allocator.evict_to_free_tokens(tree, tokens)
        assert made.allocator.available_size() == tokens == 200 // both and made.sinks.used == 0


def test_sets_in_use_are_not_evictable() -> None:
    made = pools(40)
    tree = Tree(made, 4, 0)
    made.sinks.capture("a", ("a",), lambda: 1, lambda: torch.arange(1, 5))
    assert made.allocator.evictable_units(tree) == 4
    made.allocator.evict_to_free_tokens(tree, 20)
    assert made.sinks.used == 1 and made.allocator.available_size() == 18


def test_retractions_are_counted_by_what_was_short() -> None:
    made = pools(40, full_limit=30)
    allocator, tree = made.allocator, Tree(made, 1, 0)
    allocator.count_retraction()
    assert vars(allocator.retractions) == {"memory": 0, "limit": 0, "other": 1}
    allocator.alloc(10)
    allocator.swa_attn_allocator.alloc(17)
    assert not allocator.check_decode_capacity(num_tokens=5, tree_cache=tree)
    allocator.count_retraction()
    assert vars(allocator.retractions) == {"memory": 1, "limit": 0, "other": 1}
    allocator.clear()
    allocator.full_attn_allocator.alloc(28)
    tree.full = 0
    assert not allocator.check_decode_capacity(num_tokens=5, tree_cache=tree)
    allocator.count_retraction()
    assert vars(allocator.retractions) == {"memory": 1, "limit": 1, "other": 1}
    assert allocator.check_decode_capacity(num_tokens=2, tree_cache=tree)
    allocator.count_retraction()
    assert vars(allocator.retractions) == {"memory": 1, "limit": 1, "other": 2}


def test_a_request_that_is_thrown_out_is_counted_and_one_that_ends_is_not() -> None:
    made = Rig(400)
    one, two = made.request(range(30)), made.request(range(50, 80))
    assert made.prefill(one) and made.prefill(two)
    made.retract(one)
    made.finish(two)
    assert vars(made.allocator.retractions) == {"memory": 0, "limit": 0, "other": 1}


@pytest.mark.parametrize("limit", [None, 90])
def test_what_a_request_may_output(limit: int | None) -> None:
    made = pools(400, full_limit=limit)
    allocator = made.allocator
    longest = allocator.demand.longest(400, allocator.size_full)
    assert longest <= (limit or 400)

    def most(tokens: int, output: int) -> int | None:
        return allocator.max_new_tokens_for_memory(
            tokens, output, token_capacity=5, sliding_window_size=3, chunk_size=2
        )

    assert most(10, 7) == 7
    assert most(10, 10**6) == longest - 11
    assert most(longest - 1, 10**6) == 0 and most(longest, 1) is None


def test_sinks_leave_alone_what_the_next_batch_was_promised() -> None:
    """They are taken between admission and allocation."""
    made = pools(40)
    allocator = made.allocator
    allocator.promised = 36
    assert allocator.sinks.alloc(4) is not None and allocator.sinks.alloc(1) is None
    allocator.alloc(2)
    assert allocator.promised == 0 and allocator.sinks.alloc(4) is not None
    assert allocator.check_decode_capacity(num_tokens=3, tree_cache=Tree(made, 1, 0))
    assert allocator.promised == 6
    allocator.create_prefill_budget(None)
    assert allocator.promised == 0


def test_cached_tokens_go_for_sinks() -> None:
    made = pools(40)
    tree = Tree(made, 16, 8)
    made.allocator.tree_cache = tree
    made.allocator.promised = 14
    assert len(made.allocator.units) == 16
    assert made.allocator.sinks.alloc(4) is not None
    assert tree.asked == [(2, 0)], "as much as is wanted"
    made.allocator.promised = 100
    before = list(tree.asked)
    assert made.allocator.sinks.alloc(4) is None and tree.asked == before, "in vain: nothing is evicted"


def test_a_group_of_frees_goes_on_behind_an_eviction_for_sinks() -> None:
    made = pools(40)
    made.allocator.tree_cache = Tree(made, 18, 2)
    held = made.allocator.alloc(8)
    made.allocator.promised = 2
    made.allocator.free_group_begin()
    made.allocator.free_segment(held[:4], start_pos=0)
    assert made.allocator.sinks.alloc(8) is not None
    assert made.allocator.free_group is not None
    made.allocator.free_segment(held[4:], start_pos=4)
    made.allocator.free_group_end()
    owned = made.allocator.full_used + made.allocator.swa_attn_allocator.used + made.allocator.sinks.used
    assert len(made.allocator.units) + owned == 40
