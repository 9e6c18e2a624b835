"""lt_sglang.layers.prefill: who is decided when, who is staged, who inherits."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lt_sglang.config import LIST, LightTransferConfig
from lt_sglang.layers.chosen import remember
from lt_sglang.layers.layer_sets import LayerSet, LayerSetStore
from lt_sglang.layers.prefill import Kind, Prefill, PrefillTracker

SINKS, RECENT = 4, 60
BLOCK = SINKS + RECENT


def tracker(decide: str = "prompt", undecided: int = 3000, score: str = "residual-error") -> PrefillTracker:
    config = LightTransferConfig(
        (0, 4, 5),
        mode="dynamic",
        sink_tokens=SINKS,
        recent_tokens=RECENT,
        keep=3,
        decide=decide,
        score=score,
    )
    if decide == "first-chunk":
        undecided = config.decide_tokens - 1
    return PrefillTracker(config, LayerSetStore(12, config.lazy_layers, 6, 16, "cpu"), undecided)


class Request:
    """A request as SGLang's scheduler shows it, prefilled chunk by chunk."""

    def __init__(self, name: str, prompt: list[int], row: int = 1, extra_key: str | None = None) -> None:
        self.name = name
        self.req: Any = SimpleNamespace(
            origin_input_ids=array("q", prompt),
            output_ids=array("q"),
            prefix_len=0,
            extend_end=0,
            extra_key=extra_key,
            cache_salt=None,
            kv=SimpleNamespace(req_pool_idx=row),
            sampling_params=SimpleNamespace(n=1),
        )

    def chunk(self, tokens: int) -> tuple[str, Any]:
        """The next ``tokens`` tokens, or what is left."""
        total = len(self.req.origin_input_ids) + len(self.req.output_ids)
        self.req.prefix_len = self.req.extend_end
        self.req.extend_end = min(self.req.prefix_len + tokens, total)
        return self.name, self.req


def tokens(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


def kinds(plans: list[Prefill]) -> list[Kind]:
    return [plan.kind for plan in plans]


@pytest.mark.parametrize("decide", ["prompt", "first-chunk"])
@pytest.mark.parametrize("length", [1, 4, 63, 64])
def test_short_prompts_use_the_default(length: int, decide: str) -> None:
    """All their scores are equal; no chunk of them is ever undecided."""
    prefills = tracker(decide)
    request = Request("a", tokens(length))
    for _ in range(0, length, 30):
        (plan,) = prefills.begin([request.chunk(30)])
        assert (plan.kind, plan.layer_set, plan.last_queries) == (Kind.KNOWN, 0, 0)
    assert prefills.sets.stats.short == 1 and prefills.sets.stats.decided == 0
    assert prefills.hit_tokens(length) == 0


def test_health_checks_are_not_counted() -> None:
    """An idle engine that is asked for a token every ten seconds has no short prompts to report."""
    prefills = tracker()
    probe, short = Request("probe", [0], row=1), Request("short", [0], row=2)
    prefills.begin([probe.chunk(1), short.chunk(1)], {"probe"})
    assert prefills.sets.stats.short == 1
    assert prefills.sets.of("probe") is prefills.sets.of("short") is prefills.sets.default


@pytest.mark.parametrize("length", [65, 66, 255, 256])
def test_one_chunk_is_decided_at_once(length: int) -> None:
    prefills = tracker()
    (plan,) = prefills.begin([Request("a", tokens(length), row=7).chunk(256)])
    entry = prefills.sets.of("a")
    assert entry is not None
    assert plan == Prefill(Kind.SELECT, 7, entry.index, 0, length, 32) and plan.end == length
    assert entry.known and entry.stored and prefills.staged is None
    assert prefills.hit_tokens(length) == BLOCK


@pytest.mark.parametrize("length", [257, 260, 512, 513, 2999])
def test_in_chunks_it_waits_for_the_prompts_end(length: int) -> None:
    prefills = tracker()
    request = Request("a", tokens(length))
    seen = []
    while request.req.extend_end < length:
        (plan,) = prefills.begin([request.chunk(256)])
        seen.append(plan.kind)
        entry = prefills.sets.of("a")
        assert entry is not None and entry.known == (plan.end == length)
        assert prefills.staged == (None if plan.end == length else "a")
        assert plan.last_queries == (32 if plan.end == length else 0)
    assert seen == [Kind.STAGED] * (len(seen) - 1) + [Kind.SELECT]


@pytest.mark.parametrize(
    ("undecided", "decided_at"), [(255, 256), (256, 512), (511, 512), (512, 768), (900, 1000), (10, 256)]
)
def test_memory_bounds_the_wait(undecided: int, decided_at: int) -> None:
    """A chunk that would pass the limit is the one that decides; what follows is streamed."""
    prefills = tracker(undecided=undecided)
    request = Request("a", tokens(1000))
    for _ in range(4):
        (plan,) = prefills.begin([request.chunk(256)])
        expected = Kind.STAGED if plan.end < decided_at else Kind.KNOWN
        assert plan.kind == (Kind.SELECT if plan.end == decided_at else expected)
        if plan.kind == Kind.STAGED:
            assert plan.end <= undecided
        if plan.kind == Kind.SELECT:
            assert plan.last_queries == 32
    assert prefills.staged is None


@pytest.mark.parametrize(
    ("chunks", "decided_at", "queries"),
    [
        ([256, 256, 256], 256, 128),
        ([191, 256, 256], 447, 128),
        ([192, 256, 256], 192, 128),
        ([1, 190, 1, 500], 192, 128),
        ([1, 63, 1, 63, 63, 256], 191 + 256, 128),
    ],
)
def test_first_chunk_needs_a_window_and_128_queries(chunks: list[int], decided_at: int, queries: int) -> None:
    prefills = tracker("first-chunk")
    request = Request("a", tokens(900))
    for size in chunks:
        (plan,) = prefills.begin([request.chunk(size)])
        expected = Kind.STAGED if plan.end < decided_at else Kind.KNOWN
        assert plan.kind == (Kind.SELECT if plan.end == decided_at else expected)
        assert plan.last_queries == (queries if plan.end == decided_at else 0)


@pytest.mark.parametrize("length", [65, 100, 192, 256])
def test_first_chunk_that_is_the_whole_prompt_is_decided_as_ever(length: int) -> None:
    prefills = tracker("first-chunk")
    (plan,) = prefills.begin([Request("a", tokens(length)).chunk(256)])
    assert (plan.kind, plan.last_queries) == (Kind.SELECT, 32)


def test_the_staged_one_is_planned_before_the_one_to_be_staged() -> None:
    """Whatever the order of the batch; the answer is in the batch's order."""
    for swap in (False, True):
        prefills = tracker()
        old, new = Request("old", tokens(300), 1), Request("new", tokens(900, 1), 2)
        prefills.begin([old.chunk(256)])
        batch = [old.chunk(256), new.chunk(212)]
        plans = prefills.begin(batch[::-1] if swap else batch)
        assert kinds(plans) == ([Kind.STAGED, Kind.SELECT] if swap else [Kind.SELECT, Kind.STAGED])
        assert prefills.staged == "new"


def test_two_staged_between_chunks_is_an_error() -> None:
    prefills = tracker()
    prefills.begin([Request("a", tokens(900), 1).chunk(256)])
    with pytest.raises(RuntimeError, match="both staged"):
        prefills.begin([Request("b", tokens(900, 1), 2).chunk(256)])


def test_an_aborted_staged_request_makes_way() -> None:
    prefills = tracker()
    prefills.begin([Request("a", tokens(900), 1).chunk(256)])
    prefills.release("a", 1)
    assert prefills.staged is None and prefills.sets.requests == 0
    other = Request("b", tokens(900, 1), 1)
    assert kinds(prefills.begin([other.chunk(256)])) == [Kind.STAGED]
    prefills.release("somebody else", 5)
    assert prefills.staged == "b"


def test_a_batch_places_every_request() -> None:
    prefills = tracker()
    batch = [Request(name, tokens(100, seed), row) for seed, (name, row) in enumerate([("a", 3), ("b", 9)])]
    plans = prefills.begin([request.chunk(256) for request in batch])
    prefills.sets.flush()
    assert [int(prefills.sets.set_of[row]) for row in (3, 9)] == [plan.layer_set for plan in plans]
    assert len({plan.layer_set for plan in plans}) == 2


def prompt_start_of(prefills: PrefillTracker, request: Request) -> Any:
    return prefills.prompt_start(request.req.origin_input_ids, request.req.extra_key, None)


def test_two_that_begin_alike_at_the_same_time_are_decided_each() -> None:
    prefills = tracker()
    prompt = tokens(100)
    one, two = Request("a", prompt, 1), Request("b", prompt, 2)
    plans = prefills.begin([one.chunk(256), two.chunk(256)])
    assert kinds(plans) == [Kind.SELECT, Kind.SELECT] and plans[0].layer_set != plans[1].layer_set
    found = list(prefills.sets.find(prompt_start_of(prefills, one)))
    assert found == [prefills.sets.of("b"), prefills.sets.of("a")]


def test_an_heir_is_decided_from_its_first_chunk_on() -> None:
    prefills = tracker()
    prompt = tokens(100)
    prefills.begin([Request("a", prompt, 1).chunk(256)])
    heir = Request("b", prompt + tokens(600, 1), 2)
    begins = prompt_start_of(prefills, heir)
    prefills.inherit("b", prefills.sets.of("a"), begins)
    heir.req.extend_end = 100
    for _ in range(3):
        (plan,) = prefills.begin([heir.chunk(256)])
        assert plan.kind == Kind.KNOWN and plan.last_queries == 0
        entry = prefills.sets.of("a")
        assert entry is not None and plan.layer_set == entry.index
    assert prefills.sets.stats.inherited == 1


def test_only_prompts_of_one_owner_begin_alike() -> None:
    prefills = tracker()
    prompt = array("q", tokens(100))
    sets = prefills.sets
    sets.create("a", prefills.prompt_start(prompt, None, None))
    sets.mark_known("a")

    def found(prompt: Any, extra_key: str | None = None, salt: str | None = None) -> bool:
        return list(sets.find(prefills.prompt_start(prompt, extra_key, salt))) == [sets.of("a")]

    assert found(prompt) and found(prompt[:BLOCK] + array("q", [1, 2, 3]))
    other = array("q", prompt)
    other[BLOCK - 1] += 1
    assert not found(other)
    assert not found(prompt, "adapter") and not found(prompt, None, "salt")


def test_a_prefix_whose_set_is_gone_is_an_error() -> None:
    prefills = tracker()
    request = Request("c", tokens(100))
    begins = prompt_start_of(prefills, request)
    gone = LayerSet(3, 4, known=True)
    for entry in (None, gone):
        with pytest.raises(RuntimeError, match="layer set of its cached prefix is gone"):
            prefills.inherit("b", entry, begins)
    request.req.prefix_len = request.req.extend_end = 80
    with pytest.raises(RuntimeError, match="cached prefix without a layer set"):
        prefills.begin([request.chunk(256)])


def test_a_short_prompt_may_reuse_anything_of_the_default_set() -> None:
    prefills = tracker()
    for length in (2, 60, BLOCK):
        prefills.inherit(f"r{length}", prefills.sets.default, None)
        assert prefills.sets.of(f"r{length}") is prefills.sets.default


def test_what_left_the_cache_is_decided_again() -> None:
    """The set is stored, and yet there was no hit: another one is decided, and tried first from then on."""
    prefills = tracker()
    prompt = tokens(100)
    one = Request("a", prompt, 1)
    prefills.begin([one.chunk(256)])
    entry = prefills.sets.of("a")
    prefills.release("a", 1)
    prefills.begin([Request("b", prompt, 1).chunk(256)])
    again = prefills.sets.of("b")
    assert again is not None and again is not entry
    assert list(prefills.sets.find(prompt_start_of(prefills, one))) == [again, entry]
    assert prefills.sets.check_integrity() == []


def retract(prefills: PrefillTracker, request: Request, output: list[int]) -> None:
    """As DynamicRadixCache.on_release and SGLang do."""
    prefills.sets.bring()
    remember(request.req, prefills.memory_of(request.name, lambda: 0))
    prefills.release(request.name, 1)
    request.req.output_ids = array("q", output)
    request.req.prefix_len = request.req.extend_end = 0


def test_a_short_prompt_that_is_retracted_keeps_the_default_set() -> None:
    """However long its output: its layers must not change in the middle of an answer."""
    prefills = tracker()
    request = Request("a", tokens(60), 1)
    prefills.begin([request.chunk(256)])
    retract(prefills, request, tokens(40, 1))
    assert prefills.chunk_limit(request.req) is None
    (plan,) = prefills.begin([request.chunk(256)])
    assert (plan.kind, plan.layer_set, plan.extend) == (Kind.KNOWN, 0, 100)
    assert (prefills.sets.stats.short, prefills.sets.stats.decided) == (1, 0), "counted once"


def test_a_retracted_request_brings_its_layers_and_computes_its_prompt_alone() -> None:
    """Its prompt as at first, with full attention; its output behind it, with streaming attention."""
    prefills = tracker()
    request = Request("a", tokens(300), 1)
    (first,) = prefills.begin([request.chunk(512)])
    scores = (0.5, 0.25, 0.125, 1.0, 2.0, 3.0)
    prefills.sets.laziness[first.layer_set] = torch.tensor(scores)
    retract(prefills, request, tokens(40, 1))
    assert prefills.chunk_limit(request.req) == 300
    (staged,) = prefills.begin([request.chunk(200)])
    assert (staged.kind, staged.laziness) == (Kind.STAGED, scores)
    request.req.prefix_len = 200
    assert prefills.chunk_limit(request.req) == 100
    (plan,) = prefills.begin([request.chunk(100)])
    assert (plan.kind, plan.end, plan.laziness) == (Kind.SELECT, 300, scores)
    request.req.prefix_len = 300
    assert prefills.chunk_limit(request.req) is None
    (rest,) = prefills.begin([request.chunk(512)])
    assert (rest.kind, rest.prefix, rest.extend, rest.laziness) == (Kind.KNOWN, 300, 40, None)
    assert prefills.sets.stats.decided == 1, "counted once"
    assert prefills.sets.check_integrity() == []


def test_retracted_twice_before_it_is_decided_again() -> None:
    prefills = tracker()
    request = Request("a", tokens(300), 1)
    prefills.begin([request.chunk(512)])
    retract(prefills, request, tokens(40, 1))
    prefills.begin([request.chunk(200)])
    retract(prefills, request, tokens(40, 1))
    assert prefills.chunk_limit(request.req) == 300


def test_a_decision_nobody_may_share_is_not_found() -> None:
    """Embed overrides: K and V that the token ids do not tell, so layers that they do not tell."""
    prefills = tracker()
    request = Request("a", tokens(300), 1)
    request.req.positional_embed_overrides = object()
    prefills.begin([request.chunk(512)])
    assert prefills.sets.stored == 0
    prefills.release("a", 1)
    assert prefills.sets.check_integrity() == []


@pytest.mark.parametrize("score", [LIST, "residual-error"])
def test_with_a_list_full_attention_ends_where_prompts_part(score: str) -> None:
    """Chunks before that are staged; the next chunk is known. Without a list nobody looks at others."""
    prefills = tracker(score=score)
    first, second = Request("a", tokens(500)), Request("b", tokens(300) + tokens(60, seed=1), row=2)
    prefills.begin([first.chunk(500)])
    start = prefills.prompt_start(second.req.origin_input_ids, None, None)
    prefills.branch(second.req, start, None, most=359, page_size=1)
    listed = score == LIST
    assert prefills.chunk_limit(second.req) == (300 if listed else None)
    found = []
    for _ in range(3):
        limit = prefills.chunk_limit(second.req) or 120
        (plan,) = prefills.begin([second.chunk(min(120, limit))])
        found.append((plan.kind, plan.end))
        second.req.prefix_len = second.req.extend_end  # as SGLang has it when it asks for the next limit
    ends = [(Kind.STAGED, 120), (Kind.STAGED, 240), (Kind.SELECT, 300 if listed else 360)]
    assert found == ends
    entry = prefills.sets.of("b")
    assert entry is not None and entry.branching_seqlen == (300 if listed else 0)
    if listed:
        (plan,) = prefills.begin([second.chunk(120)])
        assert (plan.kind, plan.end) == (Kind.KNOWN, 360)
        assert not prefills.refuses(entry, 364, 300) and prefills.refuses(entry, 365, 300)
        assert not prefills.refuses(entry, 1000, 301), "the next turn of a conversation"
        assert prefills.sets.of("a").branching_seqlen == 0, "its list was applied at the end of its prompt"


def test_who_does_not_stop_where_prompts_part() -> None:
    """A whole prompt again; less than a block before, or more behind; who may not read so much."""
    prefills = tracker(score=LIST)
    prefills.begin([Request("a", tokens(500)).chunk(500)])

    def limit(prompt: list[int], page: int = 1, most: int = 999) -> int | None:
        req = Request("b", prompt).req
        start = prefills.prompt_start(req.origin_input_ids, None, None)
        prefills.branch(req, start, None, most=most, page_size=page)
        return prefills.chunk_limit(req)

    other = tokens(BLOCK, seed=1)
    assert limit(tokens(500)[:300] + other) == 300
    assert limit([*tokens(500)[:300], *other, 7]) is None
    assert limit(tokens(500)[:300] + other[:50], page=16) == 288
    assert limit(tokens(500)[: BLOCK + 1] + other[:50], page=24) is None
    assert limit(tokens(500)[:300] + other, most=299) is None
    assert limit(tokens(500)) is None and limit([*tokens(500), 7]) is None
    assert limit([*tokens(500), 7, 8]) == 500
    assert limit(tokens(500), page=16) is None
    assert limit(tokens(500)[: BLOCK - 1] + other) is None


def test_copies_stop_where_the_request_ahead_of_them_did() -> None:
    prefills = tracker(score=LIST)
    prompt = tokens(300) + tokens(60, seed=1)
    prefills.begin([Request("a", tokens(500)).chunk(500)])
    for branching_seqlen in (0, 300):
        req = Request("b", prompt).req
        ahead = LayerSet(1, 1, branching_seqlen=branching_seqlen)
        start = prefills.prompt_start(req.origin_input_ids, None, None)
        prefills.branch(req, start, ahead, most=359, page_size=1)
        assert prefills.chunk_limit(req) == (branching_seqlen or None)


def test_a_list_applied_for_want_of_memory_parts_nothing() -> None:
    """A prompt too long to stay undecided goes on too, and its hit is for everybody."""
    prefills = tracker(undecided=100, score=LIST)
    request = Request("a", tokens(500))
    (plan,) = prefills.begin([request.chunk(200)])
    entry = prefills.sets.of("a")
    assert plan.kind == Kind.SELECT and entry is not None and entry.branching_seqlen == 0
