"""How long the scheduler's look at 128 waiting requests takes, with more and more conversations in the cache.

    make touch-prefix        (or python -m tests.property.touch_prefix)

All conversations begin with one system prompt longer than the first block, and each has a layer set of its
own, as those have that were decided before they could inherit. The waiting requests are next turns. Prints
milliseconds: the best and the median of 21 rounds, and the part of it that SGLang's own walk takes.
"""

from __future__ import annotations

import random
import statistics
import time
from array import array

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.common import touch_waiting_prefix
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from lt_sglang.cache.radix_dynamic import _name
from tests.property.cpu import Caches, Sizes, request

SINK, RECENT, SYSTEM, OWN, TURN, WAITING, ROUNDS = 4, 1020, 1500, 200, 60, 128, 21


def measure(conversations: int, seed: int = 1) -> tuple[float, float, float]:
    """Milliseconds for all waiting requests: best, median, and the best without the search for the set."""
    rng = random.Random(seed)
    slots = conversations * (SYSTEM + OWN)
    sizes = Sizes(
        SINK,
        RECENT,
        units=2 * slots,
        sets=conversations,
        rows=8,
        layer_sets=conversations + 8,
        chunk=SYSTEM + OWN,
        dynamic=True,
    )
    caches = Caches(sizes)
    tree, prefills = caches.tree, caches.prefills
    assert prefills is not None
    system = [rng.randrange(30000) for _ in range(SYSTEM)]
    prompts = [system + [rng.randrange(30000) for _ in range(OWN)] for _ in range(conversations)]
    for number, prompt in enumerate(prompts):
        name, tokens = f"r{number}", array("q", prompt)
        entry = prefills.sets.create(name, prefills.prompt_start(tokens, None, None))
        prefills.sets.mark_known(name)
        value = caches.allocator.alloc(len(prompt))
        tree.insert(InsertParams(key=RadixKey(tokens, _name(entry.uid, None)), value=value.to(torch.int64)))
        prefills.sets.release(name, None)
    chosen = [rng.randrange(conversations) for _ in range(WAITING)]
    turns = [prompts[number] + [rng.randrange(30000) for _ in range(TURN)] for number in chosen]
    waiting = [request(f"w{number}", turn) for number, turn in enumerate(turns)]
    for number, req in zip(chosen, waiting, strict=True):
        prompt = tree._prompt_start(RadixKey(req.origin_input_ids))
        assert next(tree._sets_of(prompt)).uid == number + 1, "not the set that agrees longest"

    def ours() -> None:
        for req in waiting:
            touch_waiting_prefix(req, tree)

    def stock() -> None:
        for number, req in zip(chosen, waiting, strict=True):
            key = RadixKey(req.origin_input_ids + req.output_ids, _name(number + 1, None))
            UnifiedRadixCache.touch_prefix(tree, key)

    times = {work: [_milliseconds(work) for _ in range(ROUNDS)] for work in (ours, stock)}
    return min(times[ours]), statistics.median(times[ours]), min(times[stock])


def _milliseconds(work: object) -> float:
    begin = time.perf_counter()
    work()  # type: ignore[operator]
    return 1000 * (time.perf_counter() - begin)


if __name__ == "__main__":
    print(f"{WAITING} waiting requests of {SYSTEM + OWN + TURN} tokens, first block {SINK + RECENT}")
    first = 0.0
    for count in (64, 512, 4096):
        best, median, stock = measure(count)
        first = first or best
        print(
            f"{count:5d} conversations: best {best:.1f} ms, median {median:.1f} ms, {best / first:.2f} times "
            f"as long as over 64; SGLang's own walk {stock:.1f} ms"
        )
