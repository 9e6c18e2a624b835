"""lt_sglang.memory.budget: SGLang's own PrefillAdder over memory that full and lazy layers share."""

from __future__ import annotations

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.sampling.sampling_params import SamplingParams

from lt_sglang.hooks import wrappers
from lt_sglang.memory.budget import UnitBudget, output_of, running_offset
from lt_sglang.memory.units import UnitShape
from tests.pools import Pools, make_pools

from .life_rig import HookedAdder

CONTEXT, CHUNK, WINDOW = 100_000, 64, 8


class Tree:
    """A prefix cache of so many evictable tokens; nothing in it is ever hit."""

    def __init__(self, full: int = 0, streaming: int = 0) -> None:
        self.full, self.streaming, self.disable, self.locked = full, streaming, False, 0
        self.root = SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("supports_"):
            return lambda: name == "supports_prefix_sharing"
        raise AttributeError(name)

    buffer_pipeline = None

    def full_evictable_size(self) -> int:
        return self.full

    def swa_evictable_size(self) -> int:
        return self.streaming

    def lock(self, node: Any) -> Any:
        self.locked += 1
        return SimpleNamespace(node=node)

    def unlock(self, lock: Any) -> None:
        self.locked -= 1

    def finish_storage_prefetch_admission(self, *given: Any, **named: Any) -> None: ...

    def discard_storage_prefetch_accounting(self, *given: Any) -> None: ...


def memory(units: int, **given: Any) -> Pools:
    return make_pools(units, 4, 0, requests=8, context=64, window=WINDOW, chunked_prefill_size=CHUNK, **given)


def request(prompt: int, output: int | None, **sampling: Any) -> Req:
    """One that waits; without ``output`` its client named none, and SGLang put the rest of the context."""
    limit = CONTEXT - prompt - 1 if output is None else output
    req = Req(f"r{prompt}", "", array("q", range(prompt)), SamplingParams(max_new_tokens=limit, **sampling))
    req.full_untruncated_fill_ids = req.origin_input_ids
    req.last_node = None
    return req


def running(prompt: int, decoded: int, output: int | None, **sampling: Any) -> Req:
    req = request(prompt, output, **sampling)
    req.output_ids = array("q", [1] * decoded)
    req.decode_batch_idx = decoded
    req.kv.kv_allocated_len = prompt + decoded
    req.kv.set_evicted_seqlen(ComponentType.SWA, prompt + decoded - WINDOW)
    return req


def adder(
    made: Pools, *requests: Req, ratio: float = 1.0, tree: Any = None, chunk: int | None = CHUNK
) -> HookedAdder:
    made.allocator.demand = replace(made.allocator.demand, context=CONTEXT)
    return HookedAdder(
        page_size=made.allocator.page_size,
        tree_cache=tree or Tree(),
        token_to_kv_pool_allocator=made.allocator,
        running_batch=SimpleNamespace(reqs=list(requests), batch_size=lambda: len(requests)),  # type: ignore[arg-type]
        new_token_ratio=ratio,
        rem_input_tokens=1 << 20,
        rem_chunk_tokens=chunk,
    )


def add(one: PrefillAdder, req: Req) -> Any:
    return one.add_one_req(req, has_chunked_req=False, truncation_align_size=None)


def test_as_many_are_admitted_as_fit() -> None:
    for shape in (UnitShape(1, 1), UnitShape(1, 3), UnitShape(2, 3)):
        made = memory(2000, shape=shape)
        one = adder(made, chunk=1 << 16)
        each = made.allocator.demand.of_new(30, 20)
        results = [add(one, request(30, 20)) for _ in range(2000 // each + 1)]
        assert len(one.can_run_list) == 2000 // each
        assert results[-1] == AddReqResult.NO_TOKEN and results[0] == AddReqResult.CONTINUE
        assert one.tree_cache.locked == len(one.can_run_list)
        assert 0 <= one.memory_budget.remaining_units < each


def test_beside_an_unfinished_chunk_nobody_is_cut_into_chunks() -> None:
    """SGLang stops with an assertion if a chunk that ended for memory leaves room for another."""
    for prompt, unfinished, result in (
        (30, True, AddReqResult.CONTINUE),
        (100, True, AddReqResult.OTHER),
        (100, False, AddReqResult.OTHER),
    ):
        one, asked = adder(memory(2000)), request(prompt, 20)
        assert one.add_one_req(asked, has_chunked_req=unfinished, truncation_align_size=None) == result
        assert one.new_chunked_req is (asked if prompt == 100 and not unfinished else None)
        assert (asked in one.can_run_list) == (one.new_chunked_req is asked or prompt == 30)


def test_the_last_unit_is_given_out() -> None:
    made = memory(1000)
    each = made.allocator.demand.of_new(30, 20)
    for units, fits in ((3 * each, 3), (3 * each - 1, 2)):
        made = memory(units)
        one = adder(made, chunk=1 << 16)
        for _ in range(4):
            add(one, request(30, 20))
        assert len(one.can_run_list) == fits


def test_what_the_cache_would_give_back_counts() -> None:
    made = memory(400)
    made.allocator.alloc(100)
    each = made.allocator.demand.of_new(30, 20)
    for tree, units in ((Tree(), 200), (Tree(100, 30), 330), (Tree(0, 50), 250)):
        one = adder(made, tree=tree, chunk=1 << 16)
        while add(one, request(30, 20)) == AddReqResult.CONTINUE:
            pass
        assert len(one.can_run_list) == units // each


def test_a_long_output_that_was_named_is_not_clipped() -> None:
    """SGLang reckons with 4096 at most; then long answers are retracted again and again."""
    made = memory(12_000)
    assert made.allocator.demand.of_new(20, 8000) < 12_000 < 2 * made.allocator.demand.of_new(20, 8000)
    one = adder(made)
    add(one, request(20, 8000))
    assert add(one, request(20, 8000)) == AddReqResult.NO_TOKEN and len(one.can_run_list) == 1
    assert made.allocator.demand.of_new(20, 4096) * 2 < 12_000, "clipped, both would be admitted"


def test_one_that_was_not_named_is() -> None:
    """The rest of the context, which few reach."""
    made = memory(12_000)
    one = adder(made)
    for _ in range(3):
        add(one, request(20, None))
    assert len(one.can_run_list) == 12_000 // made.allocator.demand.of_new(20, 4096) == 2
    assert output_of(request(20, None), 1.0, made.allocator.demand) == 4096


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_running_requests_are_weighed_by_the_ratio(ratio: float) -> None:
    made = memory(3000)
    reqs = [running(50, 10, 1000), running(50, 300, 1000)]
    one = adder(made, *reqs, ratio=ratio)
    demand = made.allocator.demand
    expected = sum(demand.of_running(WINDOW, int((1000 - decoded) * ratio)) for decoded in (10, 300))
    assert one.memory_budget.remaining_units == pytest.approx(3000 - expected)
    waiting = request(30, 100)
    assert add(one, waiting) != AddReqResult.NO_TOKEN
    assert one.memory_budget.remaining_units == pytest.approx(
        3000 - expected - demand.of_new(30, int(100 * ratio))
    )


def test_who_ignores_the_end_is_reckoned_whole() -> None:
    made = memory(3000)
    demand = made.allocator.demand
    one = running(50, 10, 1000, ignore_eos=True)
    assert output_of(one, 0.1, demand) == 990
    assert running_offset(one, 0.1, made.allocator) == demand.of_running(WINDOW, 990) / 2
    without = Tree()
    without.disable = True  # SGLang goes by another rule then
    passes = adder(made, ratio=0.1, tree=without, chunk=1 << 16)
    each = demand.of_new(30, 100)
    while add(passes, request(30, 100, ignore_eos=True)) == AddReqResult.CONTINUE:
        pass
    assert len(passes.can_run_list) == 3000 // each


def test_a_request_that_came_back_is_reckoned_from_its_last_token() -> None:
    made = memory(3000)
    back = running(50, 40, 100)
    back.decode_batch_idx = 0
    assert output_of(back, 1.0, made.allocator.demand) == 60
    over = running(50, 120, 100)
    assert output_of(over, 1.0, made.allocator.demand) == 0


def test_one_prompt_in_chunks_is_reckoned_whole_and_goes_on() -> None:
    """Later chunks included, so that no other takes what it was promised; and each pass makes progress."""
    made = memory(1300)
    demand = made.allocator.demand
    long = request(400, 20)
    one = adder(made)
    add(one, long)
    assert one.new_chunked_req is long and long.extend_end == CHUNK
    assert one.memory_budget.remaining_units == 1300 - demand.of_new(400, 20)
    held: list[Any] = []
    while long.extend_end < 400:
        held.append(made.allocator.alloc(long.extend_end - long.prefix_len))
        streaming = made.allocator.swa_attn_allocator.used
        if streaming > WINDOW:
            gone = held[-1] if len(held) == 1 else held[-2][-WINDOW:]
            if len(held) > 1:
                made.allocator.free_swa_segment(gone, start_pos=0)
                made.allocator.free_swa_segment(held[-1][:-WINDOW], start_pos=0)
            else:
                made.allocator.free_swa_segment(held[-1][:-WINDOW], start_pos=0)
        long.prefix_len = long.extend_end
        one = adder(made)
        unfinished = one.add_chunked_req(long)
        assert one.can_run_list == [long] and long.extend_end == min(long.prefix_len + CHUNK, 400)
        assert (unfinished is long) == (long.extend_end < 400)
        assert one.memory_budget.remaining_units >= 0, "others took what it was promised"
        left = one.memory_budget.remaining_units
        other = request(int(left), 5)
        assert add(one, other) in (AddReqResult.NO_TOKEN, AddReqResult.OTHER)


def test_a_chunk_takes_what_is_there_and_waits_for_a_page() -> None:
    """A prompt that began takes less than a chunk rather than nothing."""
    made = memory(1000)
    long = request(400, 20)
    long.prefix_len = 64
    made.allocator.alloc(480)
    one = adder(made)
    assert one.add_chunked_req(long) is long
    assert long.extend_end == 64 + 19, "one page is left over"
    made.allocator.alloc(19)
    one = adder(made)
    assert one.add_chunked_req(long) is long and not one.can_run_list
    assert not one.memory_budget.has_capacity() or one.memory_budget.remaining_units < 3


def test_pages() -> None:
    made = memory(100, page_size=16)
    demand = made.allocator.demand
    assert demand.of_new(20, 20) == 3 + 1 + 2  # 40 tokens; their window; and a page of each
    one = adder(made, chunk=1 << 16)
    while add(one, request(20, 20)) == AddReqResult.CONTINUE:
        pass
    assert len(one.can_run_list) == 100 // demand.of_new(20, 20)
    assert one.memory_budget.remaining_total == one.memory_budget.remaining_units / 2 * 16
    assert one.memory_budget.remaining_current == one.memory_budget.remaining_swa == one.rem_total_tokens
    long = request(400, 20)
    long.prefix_len = 64
    made.allocator.swa_attn_allocator.alloc(16 * 93)
    one = adder(made)
    assert one.add_chunked_req(long) is long and long.extend_end == 64 + 2 * 16


def test_a_limit_of_tokens_in_full_layers() -> None:
    """--max-total-tokens: counted in tokens, beside the units."""
    made = memory(10_000, full_limit=300)
    one = adder(made, chunk=1 << 16)
    while add(one, request(30, 20)) == AddReqResult.CONTINUE:
        pass
    assert len(one.can_run_list) == (300 - 1) // 50
    again = adder(made, running(30, 10, 100), chunk=1 << 16)
    made.allocator.alloc(41)
    while add(again, request(30, 20)) == AddReqResult.CONTINUE:
        pass
    assert len(again.can_run_list) == (300 - 41 - 90 - 1) // 50
    cached = adder(made, chunk=1 << 16, tree=Tree(41, 0))
    while add(cached, request(30, 20)) == AddReqResult.CONTINUE:
        pass
    assert len(cached.can_run_list) == 5, "what is cached can be evicted"


def test_undecided_prompts_are_reckoned_with_all_slots() -> None:
    made = memory(1000)
    made.allocator.demand = made.allocator.demand.undecided_up_to(10_000)
    one = adder(made, chunk=1 << 16)
    while add(one, request(100, 5)) == AddReqResult.CONTINUE:
        pass
    assert len(one.can_run_list) == 1000 // (200 + 2)


def test_nothing_is_promised_to_whom_nobody_considered() -> None:
    made = memory(1000)
    with pytest.raises(AssertionError, match="nobody considered"):
        UnitBudget(made.allocator, Tree()).reserve(5, 5)


def test_other_allocators_are_reckoned_as_sglang_does() -> None:
    seen: list[Any] = []
    stock = SimpleNamespace(token_to_kv_pool_allocator=object(), new_token_ratio=0.5)
    assert wrappers.running_offset(lambda *given: seen.append(given) or 17.0, stock, "req") == 17.0
    assert seen == [(stock, "req")]
    wrappers._consider(SimpleNamespace(memory_budget=object()), "req")  # says nothing of requests


class LoadingTree(Tree):
    """A tree that loads what a request hit in host memory, or finds that it cannot."""

    def __init__(self, made: Pools, *, loads: bool = True) -> None:
        super().__init__()
        self.made, self.loads, self.asked = made, loads, 0
        made.allocator.tree_cache = self

    def tokens_to_load(self, req: Req) -> int:
        """All that it hit."""
        return req.host_hit_length

    def inc_host_lock_ref(self, node: Any) -> Any:
        return SimpleNamespace(to_dec_params=lambda: "params")

    def dec_host_lock_ref(self, node: Any, params: Any) -> None: ...

    def init_load_back(self, params: Any) -> tuple[int, Any]:
        """As UnifiedRadixCache: slots of both kinds, or nothing."""
        self.asked += 1
        if not self.loads:
            return 0, None
        allocator, req = self.made.allocator, params.req
        assert allocator.full_attn_allocator.alloc(req.host_hit_length) is not None
        assert allocator.swa_attn_allocator.alloc(req.swa_host_hit_length) is not None
        return req.host_hit_length, None

    def load_back_is_cache_owned(self) -> bool:
        return True


def hit(prompt: int, on_host: int, streaming: int, output: int) -> Req:
    """One whose first ``on_host`` tokens are in host memory."""
    req = request(prompt, output)
    req.host_hit_length, req.swa_host_hit_length = on_host, streaming
    return req


@pytest.mark.parametrize("shape", [UnitShape(1, 1), UnitShape(1, 3), UnitShape(3, 2)], ids=str)
def test_what_is_loaded_is_reckoned_to_the_last_unit(shape: UnitShape) -> None:
    """In full layers all of it, in lazy ones its window; once loaded it is no longer promised."""
    demand = memory(2000, shape=shape).allocator.demand
    needed = demand.of_new(40, 5) + demand.units(100, 8)
    for units, result in ((needed, True), (needed - 1, False)):
        made = memory(units, shape=shape)
        tree = LoadingTree(made)
        one, asked = adder(made, tree=tree), hit(140, 100, 8, 5)
        assert add(one, asked) == AddReqResult.NO_TOKEN, "nothing is left for another"
        assert tree.asked == result and (asked in one.can_run_list) is result
        if result:
            assert asked.prefix_len == 100 and one.memory_budget.remaining_units == 0
            assert len(made.allocator.units) == demand.of_new(40, 5)


def test_what_a_load_holds_is_no_longer_evictable() -> None:
    """Tokens of the hit that are on the device: they count until the request holds them."""
    made = memory(2000)
    tree = LoadingTree(made)
    tree.full = 50
    tree.tokens_to_load = lambda req: 0  # type: ignore[method-assign]
    one, asked = adder(made, tree=tree), hit(140, 100, 8, 5)

    def hold(node: Any) -> Any:
        tree.full -= 50
        return SimpleNamespace()

    def let_go(lock: Any) -> None:
        tree.full += 50

    tree.lock, tree.unlock = hold, let_go  # type: ignore[method-assign]
    demand = made.allocator.demand
    one.memory_budget.consider(asked, one, (100, 8))
    held = 50 * demand.shape.full_units
    assert one.memory_budget._need() == demand.of_new(40, 5) + demand.units(0, 8) + held
    assert one.memory_budget.extend_tokens == 40


def test_a_prompt_that_could_not_be_loaded_is_computed() -> None:
    """All of it is reckoned then, and cut into chunks."""
    made = memory(2000)
    demand = made.allocator.demand
    one, asked = adder(made, tree=LoadingTree(made, loads=False)), hit(140, 100, 8, 5)
    add(one, asked)
    assert asked.prefix_len == 0 and one.new_chunked_req is asked
    assert one.memory_budget.remaining_units == 2000 - demand.of_new(140, 5)


def test_loads_leave_alone_what_the_batch_was_promised() -> None:
    """They take their slots at once, the others of the batch when it is formed."""
    made = memory(2000)
    demand = made.allocator.demand
    one, asked = adder(made, tree=LoadingTree(made)), hit(140, 100, 8, 5)
    made.allocator.promised = 2000 - demand.units(100, 8) + 1
    one.memory_budget.consider(asked, one, (100, 8))
    assert not one.memory_budget.prepare_load_back()
    made.allocator.promised -= 1
    assert one.memory_budget.prepare_load_back()
