"""Windows slide after every chunk of a prefill, whatever becomes of the tree; no pool is too small for it.

Real pools, tree and requests on the CPU, no model (prefill_rig.py).
"""

from __future__ import annotations

import random

import pytest
from sglang.srt.managers.schedule_batch import Req

from lt_sglang.memory.split import SplitInput

from .prefill_rig import DynamicRig, Rig

WINDOW, SINKS, CHUNK, INTERVAL = 15, 4, 32, 8
LONG = 400


def rig(mode: str = "static", **changes: object) -> Rig:
    """Pools in which a prompt of LONG tokens fits the full one, and a fifth of it the streaming one."""
    given = {"full": 1000, "streaming": 90, **changes}
    if mode == "static":
        return Rig(**given)  # type: ignore[arg-type]
    return DynamicRig(**given, staging=100 if mode == "early" else 1000)  # type: ignore[arg-type]


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
    assert made.most <= WINDOW + 1 + sinks + CHUNK
    assert made.streaming_used <= WINDOW + 1 + sinks
    reads_all(made, req)
    made.check()
    assert made.decode(req, 300)
    reads_all(made, req)
    made.check()
    made.finish(req)
    assert made.streaming_used == 0 and not made.store.requests
    made.check()


@modes
def test_without_the_hook_a_barred_prompt_fills_the_pool(mode: str) -> None:
    made = rig(mode, hooked=False)
    assert not made.prefill(made.request(prompt(LONG), barred=True)), "the hook is no longer needed"


def test_a_published_chunk_is_not_touched_again() -> None:
    """The hook changes nothing for a request that SGLang publishes."""
    ends = []
    for hooked in (False, True):
        made = rig(hooked=hooked)
        req = made.request(prompt(LONG))
        assert made.prefill(req)
        ends.append((req.kv.component_evicted_seqlens, made.allocator.swa_available_size(), made.most))
    assert ends[0] == ends[1]


@modes
@pytest.mark.parametrize("barred", [False, True])
def test_a_set_that_is_found_late_frees_the_slots_that_held_the_sinks(mode: str, barred: bool) -> None:
    """Between two chunks of a long prompt, and the prompt is cached after all."""
    made = rig(mode, sets=1)
    first = made.request(prompt(40, seed=1))
    assert made.prefill(first)
    req = made.request(prompt(LONG, seed=2), barred=barred)
    made.admit(req)
    for _ in range(3):
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
    made.admit(again)
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


def test_a_retracted_request_starts_anew() -> None:
    made = rig(sets=0)
    req = made.request(prompt(LONG))
    assert made.prefill(req) and made.decode(req, 40)
    assert req.kv.swa_evict_floor == SINKS
    made.retract(req)
    assert req.kv.swa_evict_floor == 0 and made.streaming_used == 0
    made.check()


def test_refused_counts_requests() -> None:
    made = rig(sets=1, streaming=200)
    holder = made.request(prompt(40, seed=1))
    assert made.prefill(holder)
    others = [made.request(prompt(60, seed=seed)) for seed in (2, 3)]
    for req in others:
        assert made.prefill(req) and made.decode(req, 300)
    assert made.store.stats.refused == len(others)


def test_the_longest_request_fits_its_streaming_pool() -> None:
    """Seeded conversations, each turn alone in pools split for one request: never out of memory.

    A turn finds a cached prefix, whose nodes are locked whole; it is prefilled in chunks, and decodes.
    """
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    highest = 0
    for _ in range(40):
        window, chunk = rng.choice([7, 15, 40]), rng.choice([4, 16, 64])
        interval = rng.choice([1, 8, 24])
        given = SplitInput(1, 1, window + 1, SINKS, 1000, chunk, CHUNK, eviction_interval=interval)
        size = given.streaming_longest + given.streaming_fixed
        made = Rig(1000, size, window=window, chunk=chunk, interval=interval, sets=rng.choice([0, 1, 8]))
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
        highest = max(highest, made.most / size)
    assert highest > 0.5, "the bound is far from what is held"
