"""Windows slide after every chunk of a prefill, whatever becomes of the tree.

Real pools, tree and requests on the CPU, no model (life_rig.py).
"""

from __future__ import annotations

import random

import pytest
from sglang.srt.managers.schedule_batch import Req

from lt_sglang.memory.demand import Demand
from lt_sglang.memory.units import UnitShape

from .life_rig import DynamicRig, Rig

WINDOW, SINKS, CHUNK, INTERVAL = 15, 4, 32, 8
LONG, EARLY = 400, 100
MOST = 830  # tokens of a conversation, its last answer included


def rig(mode: str = "static", **changes: object) -> Rig:
    """Memory for two prompts of LONG tokens in full layers, and a few windows."""
    given = {"units": 1090, **changes}
    if mode == "static":
        return Rig(**given)  # type: ignore[arg-type]
    return DynamicRig(**given, undecided=EARLY if mode == "early" else LONG)  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 1000) for _ in range(length)]


def reads_all(made: Rig, req: Req) -> None:
    """What the next token of ``req`` sees is there: its sinks and its window."""
    assert all(made.sinks_of(req)), "a sink is gone"
    assert all(made.window_of(req)), "a token of the window is gone"


# "dynamic": decided at the prompt's end. "early": before it.
modes = pytest.mark.parametrize("mode", ["static", "dynamic", "early"])


@modes
@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("barred", [False, True])
@pytest.mark.parametrize("sets", [0, 8])
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_a_long_prompt_holds_a_window_and_its_chunk(
    mode: str, disabled: bool, barred: bool, sets: int, sinks: int
) -> None:
    made = rig(mode, disabled=disabled, sets=sets, sinks=sinks)
    req = made.request(prompt(LONG), barred=barred)
    assert made.prefill(req), "parked, with nothing else running"
    # Until a prompt is decided it keeps all.
    undecided = {"static": 0, "early": EARLY + CHUNK, "dynamic": LONG}[mode]
    assert made.most_streaming <= max(undecided, WINDOW + 1 + sinks + CHUNK)
    assert made.streaming_used <= WINDOW + 1 + sinks
    reads_all(made, req)
    made.check()
    assert made.decode(req, 300)
    reads_all(made, req)
    made.check()
    made.finish(req)
    assert made.streaming_used == 0 and not made.store.requests
    made.check()


@pytest.mark.parametrize("mode", ["static", "early"])
def test_without_the_hook_a_barred_prompt_fills_the_memory(mode: str) -> None:
    made = rig(mode, hooked=False, units=LONG + 200)
    assert not made.prefill(made.request(prompt(LONG), barred=True)), "the hook is no longer needed"


def test_a_published_chunk_is_not_touched_again() -> None:
    """The hook changes nothing for a request that SGLang publishes."""
    ends = []
    for hooked in (False, True):
        made = rig(hooked=hooked)
        req = made.request(prompt(LONG))
        assert made.prefill(req)
        ends.append((req.kv.component_evicted_seqlens, made.streaming_used, made.most_streaming))
    assert ends[0] == ends[1]


@modes
@pytest.mark.parametrize("barred", [False, True])
def test_a_set_that_is_found_late_frees_the_slots_that_held_the_sinks(mode: str, barred: bool) -> None:
    """Between two chunks of a long prompt, and the prompt is cached after all."""
    made = rig(mode, sets=1)
    first = made.request(prompt(40, seed=1))
    assert made.prefill(first)
    req = made.request(prompt(LONG, seed=2), barred=barred)
    assert made.start(req)
    for _ in range(2):
        assert made.run_chunk(req)
    assert made.store.set_of[req.kv.req_pool_idx] == -1
    own = made.sinks_of(req)
    reads_all(made, req)
    made.check()
    made.finish(first)
    while req.prefix_len < LONG:
        assert made.run_chunk(req)
    assert made.store.set_of[req.kv.req_pool_idx] == 0
    assert not set(made.sinks_of(req)) & set(own)
    assert req.kv.swa_evict_floor == 0
    reads_all(made, req)
    made.check()
    assert made.decode(req, 50)
    made.finish(req)
    made.check()
    again = made.request(prompt(LONG, seed=2))
    again.init_next_round_input(made.tree)
    assert (again.prefix_len > 0) == (not barred)


def test_a_set_that_is_found_late_in_decode() -> None:
    made = rig(sets=1)
    first = made.request(prompt(40, seed=1))
    req = made.request(prompt(100, seed=2))
    assert made.prefill(first) and made.prefill(req)
    assert made.decode(req, 40)
    reads_all(made, req)
    assert made.store.set_of[req.kv.req_pool_idx] == -1
    made.finish(first)
    assert made.decode(req, 2 * INTERVAL)
    assert made.store.set_of[req.kv.req_pool_idx] == 0
    reads_all(made, req)
    made.check()
    made.finish(req)
    made.check()


def test_a_set_that_is_found_before_the_window_has_slid() -> None:
    """Nothing has left the window yet, as in steps of a longer interval: nothing is to be freed."""
    made = rig(sets=1)
    first = made.request(prompt(40, seed=1))
    req = made.request(prompt(WINDOW + 1, seed=2), barred=True)
    assert made.prefill(first) and made.prefill(req) and made.decode(req, 1)
    made.tree.evict_sliding_windows(req, WINDOW + 2, eviction_interval=100)
    assert req.kv.swa_evict_floor == SINKS
    made.finish(first)
    made.tree.evict_sliding_windows(req, WINDOW + 2, eviction_interval=100)
    made.flush()
    assert req.kv.swa_evict_floor == 0 and made.store.set_of[req.kv.req_pool_idx] == 0
    made.check()
    assert made.decode(req, 60)
    reads_all(made, req)
    made.finish(req)
    made.check()


@modes
@pytest.mark.parametrize("length", [1, 5, WINDOW - 1, WINDOW, WINDOW + 1])
def test_a_prompt_that_fits_the_window_lets_it_go(mode: str, length: int) -> None:
    """SGLang holds it to the request's end: a short question with a long answer would have two windows."""
    made = rig(mode)
    req = made.request(prompt(length), 200)
    assert made.prefill(req) and made.decode(req, WINDOW + INTERVAL)
    for _ in range(60):
        assert made.decode(req, 1)
        assert made.streaming_used <= WINDOW + 1 + INTERVAL
        reads_all(made, req)
        made.check()
    made.finish(req)
    made.check()
    # What was let go is not read again.
    again = made.request([*prompt(length), *req.output_ids[:-1], 5, 6], 8)
    assert made.prefill(again) and made.decode(again, 6)
    reads_all(made, again)
    made.check()


def test_a_retracted_request_starts_anew() -> None:
    made = rig(sets=0)
    req = made.request(prompt(LONG))
    assert made.prefill(req) and made.decode(req, 40)
    assert req.kv.swa_evict_floor == SINKS
    made.retract(req)
    assert req.kv.swa_evict_floor == 0 and made.streaming_used == 0
    made.check()


def test_refused_counts_requests() -> None:
    made = rig(sets=1, units=1600)
    holder = made.request(prompt(40, seed=1))
    assert made.prefill(holder)
    others = [made.request(prompt(60, seed=seed)) for seed in (2, 3)]
    for req in others:
        assert made.prefill(req) and made.decode(req, 300)
    assert made.store.stats.refused == len(others)


def test_the_longest_request_fits() -> None:
    """Seeded conversations, each turn alone in memory for a request as long: never out of memory.

    A turn finds a cached prefix, whose nodes are locked whole; it is prefilled in chunks, and decodes.
    """
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    highest = 0
    for _ in range(40):
        window, chunk = rng.choice([7, 15, 40]), rng.choice([4, 16, 64])
        interval = rng.choice([1, 8, 24])
        demand = Demand(UnitShape(1, 1), 1, window + 1, interval, chunk, 10_000, sink_tokens=SINKS)
        units = next(units for units in range(900, 9000) if demand.longest(units, 1 << 30) >= MOST)
        made = Rig(units, window=window, chunk=chunk, interval=interval, sets=rng.choice([0, 1, 8]))
        history = prompt(rng.randrange(1, 100), seed=rng.randrange(10**6))
        while len(history) < 700:
            req = made.request(history, barred=rng.random() < 0.2)
            assert made.prefill(req), (window, chunk, interval)
            new = rng.randrange(1, 120)
            assert made.decode(req, new), (window, chunk, interval)
            reads_all(made, req)
            made.check()
            made.finish(req)
            made.check()
            history = [*history, *req.output_ids, *prompt(rng.randrange(1, 90), seed=rng.randrange(10**6))]
        highest = max(highest, made.most_streaming / demand.streaming_longest)
    assert highest > 0.5, "the bound is far from what is held"
