"""Two schedulers that are told the same, as those of two ranks: they must count alike, whatever else differs.

What differs here as between ranks: which units are free, the names that requests have in the stores, and so
the order of every set of them, and the time. SGLang's schedulers agree on nothing before they form a batch:
ranks that count differently form other batches, and the server hangs.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.schedule_batch import Req

from lt_sglang.memory.budget import UnitBudget, running_offset
from lt_sglang.memory.kv_keys import request_id
from tests.property.cpu import Sizes
from tests.property.scheduler import Scheduler

RATIO = 0.4  # of their outputs that SGLang reckons requests will make


class TwoRanks(Scheduler):
    """The scheduler of the first rank; ``other``, that of the second, does as it does."""

    def __init__(self, sizes: Sizes, overlap: bool = False) -> None:
        super().__init__(sizes, overlap)
        self.other = Scheduler(sizes, overlap)
        self.twins: dict[str, Req] = {}
        self._renumber()

    def submit(self, req: Req, secret: int = 0) -> None:
        """As Scheduler."""
        twin = deepcopy(req)
        self.twins[request_id(req)] = twin
        super().submit(req, secret)
        self.other.submit(twin, secret)

    def step(self, prefill: bool = True) -> bool:
        """As Scheduler."""
        self.other.preempts = self.preempts
        both = super().step(prefill), self.other.step(prefill)
        assert both[0] == both[1]
        return both[0]

    def abort(self, req: Req) -> None:
        """As Scheduler."""
        self.other.abort(self.twins[request_id(req)])
        super().abort(req)

    def retract(self, req: Req) -> None:
        """As Scheduler."""
        super().retract(req)
        self.other.retract(self.twins[request_id(req)])

    def evict(self, full: int, streaming: int) -> None:
        """As Scheduler."""
        super().evict(full, streaming)
        self.other.evict(full, streaming)

    def touch(self) -> None:
        """As Scheduler."""
        super().touch()
        self.other.touch()

    def update_weights(self, flush: bool) -> None:
        """As Scheduler."""
        super().update_weights(flush)
        self.other.update_weights(flush)
        if flush:
            self._renumber()

    def clear_all(self) -> None:
        """As Scheduler."""
        super().clear_all()
        self.other.clear_all()

    def check(self) -> None:
        """As Scheduler; and both ranks count the same."""
        super().check()
        self.other.check()
        mine, others = counts(self), counts(self.other)
        assert mine == others, {
            name: (mine[name], others[name]) for name in mine if mine[name] != others[name]
        }

    def _renumber(self) -> None:
        """The second rank hands out its units in another order."""
        units = self.other.caches.allocator.units
        units.free = units.free.flip(0)


def counts(scheduler: Scheduler) -> dict[str, Any]:
    """Every number that a rank decides by, and what it would decide next."""
    caches = scheduler.caches
    allocator, tree, store = caches.allocator, caches.tree, caches.sinks
    found: dict[str, Any] = {
        "units free": len(allocator.units),
        "available": allocator.available_size(),
        "full available": allocator.full_available_size(),
        "streaming available": allocator.swa_available_size(),
        "used": (allocator.full_used, allocator.swa_attn_allocator.used, allocator.sinks.used),
        "promised": allocator.promised,
        "retractions": asdict(allocator.retractions),
        "evictable units": allocator.evictable_units(tree) if not caches.sizes.disable else 0,
        "sinks": asdict(store.stats) | {"requests": store.requests, "droppable": store.droppable},
        "sink sets": [
            (entry.index, entry.kept, len(entry.users), key in store._promised)
            for key, entry in store._sets.items()
        ],
        "free rows": len(caches.rows.free_slots),
        "finished": tree.finished_requests,
        "events": dict(scheduler.events),
        "requests": {
            kind: [_counts_of(req) for req in reqs]
            for kind, reqs in (("waiting", scheduler.waiting), ("running", scheduler.running))
        },
        "admission": _admission(scheduler),
    }
    if not caches.sizes.disable:
        found["tree"] = (
            tree.full_evictable_size(),
            tree.swa_evictable_size(),
            tree.full_protected_size(),
            tree.swa_protected_size(),
        )
    if caches.prefills is not None:
        sets = caches.prefills.sets
        found["layer sets"] = asdict(sets.stats) | {"requests": sets.requests, "stored": sets.stored}
        found["staged"] = caches.prefills.staged is not None
    return found


def _counts_of(req: Req) -> tuple[Any, ...]:
    kv = req.kv
    held = kv.kv_allocated_len, kv.cache_protected_len, kv.swa_evict_floor
    return req.rid, list(req.output_ids), req.prefix_len, held


def _admission(scheduler: Scheduler) -> list[Any]:
    """What SGLang would be told of waiting requests, as they were last matched, and of running ones."""
    caches = scheduler.caches
    budget = UnitBudget(caches.allocator, caches.tree)
    adder = SimpleNamespace(running_batch=SimpleNamespace(reqs=scheduler.running), new_token_ratio=RATIO)
    told: list[Any] = [budget.remaining_units, budget.has_capacity()]
    for req in scheduler.waiting:
        req.refresh_fill_ids()
        budget.consider(req, adder)
        told.append((budget._need(), budget.check_prefill(chunk_limit=caches.sizes.chunk)))
        told.append(
            budget.fit_chunk(
                extend_input_len=budget.extend_tokens, max_new_tokens=1, chunk_limit=caches.sizes.chunk
            )
        )
    return told + [running_offset(req, RATIO, caches.allocator) for req in scheduler.running]
