"""A small scheduler that does with the caches what SGLang's does, in its order, with its functions.

One step is one batch. With ``overlap`` the results of a batch are processed after the next one was launched,
as in SGLang's event_loop_overlap. What a batch reads and writes happens as it is launched: SGLang keeps that
order between its two streams.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch, release_req
from sglang.srt.mem_cache.allocation import alloc_for_decode, alloc_for_extend
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache, touch_waiting_prefix
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from lt_sglang.attention.indices import sink_slots
from lt_sglang.attention.static_torch import decode_slot_lists
from lt_sglang.hooks import wrappers
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.kv_keys import request_id
from tests.property.cpu import Sizes, audit
from tests.property.reads import VERSIONS, Reads, Written
from tests.unit.streaming import visible

INTERVAL = 4


class Scheduler(Reads):
    """Requests waiting, running, and perhaps one between two chunks.

    preempts: tokens that are evicted for, once, in the middle of the next pass that admits a request.
    events: how often what happened, so that a test can tell whether it saw all it should.
    """

    def __init__(self, sizes: Sizes, overlap: bool = False) -> None:
        super().__init__(sizes)
        self.overlap = overlap
        self.waiting: list[Req] = []
        self.running: list[Req] = []
        self.chunked: Req | None = None
        self.doomed: Req | None = None
        self.preempts = 0
        self.launched: list[tuple[Req, int | None, bool]] | None = None
        self.events: Counter[str] = Counter()
        self.ended: dict[str, Req] = {}  # by rid

    @property
    def idle(self) -> bool:
        """Nothing is there, launched or waiting."""
        return not self.known and self.launched is None

    def submit(self, req: Req, secret: int = 0) -> None:
        """A request arrives; ``secret``: what, beside tokens and keys, its K and V depend on."""
        self.known[request_id(req)] = req
        self.written[request_id(req)] = Written(secret)
        self.waiting.append(req)

    def step(self, prefill: bool = True) -> bool:
        """Launch the next batch and process the results of the last; False if there is nothing to do."""
        tree = self.caches.tree
        if self.doomed is not None:
            if self.doomed is self.chunked:
                self.chunked = None
                self.doomed.finished_reason = FINISH_ABORT()
                release_kv_cache(self.doomed, tree, checkpoint=False)
                self._over(self.doomed)
                self.events["aborted between chunks"] += 1
            elif request_id(self.doomed) in self.known:
                self.doomed.to_finish = FINISH_ABORT()
            self.doomed = None
        if self.chunked is not None and self.chunked.prefix_len != self.chunked.extend_end:
            self._checkpoint(self.chunked)
        batch = self._admit() if prefill or not self.running else []
        last, self.launched = self.launched, None
        if batch:
            self._prefill(batch)
        else:
            self._make_room()
            if self.running:
                self._decode(list(self.running))
        if self.overlap:
            self._process(last)
        else:
            assert last is None
            self._process(self.launched)
            self.launched = None
        return bool(batch or last or self.launched or self.running)

    def abort(self, req: Req) -> None:
        """Its client hung up."""
        if req in self.waiting:
            self.waiting.remove(req)
            self._over(req)
        elif req is self.chunked:
            self.doomed = req
        else:
            req.to_finish = FINISH_ABORT()
        self.events["aborted"] += 1

    def retract(self, req: Req) -> None:
        """A running request gives everything back and waits again, the first in the queue."""
        # SGLang processes what is under way before it retracts anybody from outside a step.
        last, self.launched = self.launched, None
        self._process(last)
        if req in self.running:
            self._retract(req)

    def _retract(self, req: Req) -> None:
        self.running.remove(req)
        release_req(
            req=req,
            remaing_req_count=len(self.running),
            req_to_token_pool=self.caches.rows,
            token_to_kv_pool_allocator=self.caches.allocator,
            tree_cache=self.caches.tree,
            hisparse_coordinator=None,
        )
        written = self.written[request_id(req)]
        written.base.clear()
        written.version.clear()
        self.waiting.insert(0, req)
        self.events["retracted"] += 1

    def evict(self, full: int, streaming: int) -> None:
        """As an allocation that needs room."""
        self.caches.tree.evict(EvictParams(num_tokens=full, swa_num_tokens=streaming))

    def touch(self) -> None:
        """As SGLang does for the first of the queue, so that what they will hit is not evicted."""
        for req in reversed(self.waiting):
            touch_waiting_prefix(req, self.caches.tree)

    def update_weights(self, flush: bool) -> None:
        """K and V computed from now on are others; ``flush``: all caches are emptied (only when idle).

        Else, with a tree, what is cached stays, in full and lazy layers, and sinks of what was cached; and a
        request that computed it anew goes on with what the tree has.
        """
        self.version = (self.version + 1) % VERSIONS
        self.caches.sinks.weights += 1
        if flush:
            assert self.idle
            self.caches.clear()
            self.events["weights, flushed"] += 1
        else:
            self.mixed = not self.caches.sizes.disable
            self.events["weights"] += 1

    def check(self) -> None:
        """Every slot, row and set has one owner."""
        audit(self.caches, list(self.known.values()))

    def clear_all(self) -> None:
        """Flush everything; every slot must be free then."""
        caches = self.caches
        if not caches.sizes.disable:
            self.evict(1 << 20, 1 << 20)
        caches.sinks.trim(keep=0)
        assert len(caches.allocator.units) == caches.sizes.units
        caches.clear()
        self._flush()
        assert caches.sinks.used == caches.sinks.requests == 0
        if caches.prefills is not None:
            sets = caches.prefills.sets
            assert sets.requests == sets.stored == 0 and caches.prefills.staged is None

    # What SGLang's get_new_batch_prefill does.
    def _admit(self) -> list[Req]:
        tree, batch, budget, need = self.caches.tree, [], self.caches.sizes.chunk, 0
        if self.chunked is not None:
            req = self.chunked
            req.refresh_fill_ids()
            size = self._whole_pages(req, min(budget, len(req.full_untruncated_fill_ids) - req.prefix_len))
            if not size or not self._room(size):
                self.events["chunk waits"] += 1
                return []
            req.extend_end = req.prefix_len + size
            if req.extend_end == len(req.full_untruncated_fill_ids):
                self.chunked = None
            batch, budget, need = [req], budget - size, size
        free_rows = len(self.caches.rows.free_slots)
        while self.waiting and budget and self.chunked is None and free_rows:
            req = self.waiting[0]
            req.init_next_round_input(tree)
            total = len(req.full_untruncated_fill_ids)
            size = min(budget, total - req.prefix_len)
            limit = getattr(tree, "chunk_limit", lambda _: None)(req)
            size = self._whole_pages(req, size if limit is None else min(size, limit))
            lock = tree.lock(req.last_node)
            # The sinks of a cached prefix are not evictable any more once it is taken; Demand has them too.
            hits = sum(bool(one.prefix_len) for one in (*batch, req))
            if not size or not self._room(need + size, len(batch) + 1, hits):
                tree.unlock(lock)
                break
            req.lock, req.extend_end = lock, req.prefix_len + size
            self.waiting.pop(0)
            batch.append(req)
            if hasattr(tree, "bring_sinks"):
                assert tree.bring_sinks(req, nullcontext)
            if self.preempts:
                self.caches.allocator.evict_to_free_tokens(tree, self.preempts)
                self.preempts = 0
                self.events["evicted in a pass"] += 1
            budget, need, free_rows = budget - size, need + size, free_rows - 1
            self.events["hit" if req.prefix_len else "miss"] += 1
            self.events["long hit"] += req.prefix_len > self.caches.config.retained_tokens
            if req.extend_end < total:
                self.chunked = req
        self._promise(need, len(batch))
        return batch

    def _promise(self, tokens: int, requests: int) -> None:
        """As SGLang's admission and its check before each decode step."""
        allocator, page = self.caches.allocator, self.caches.sizes.page
        pages = -(-tokens // page) + (requests if page > 1 else 0)
        allocator.promised = allocator.shape.units(pages, pages) if requests else 0

    def _whole_pages(self, req: Req, size: int) -> int:
        """A chunk that others follow ends with a page."""
        end, page = req.prefix_len + size, self.caches.sizes.page
        if end < len(req.full_untruncated_fill_ids):
            end = end // page * page
        return max(end - req.prefix_len, 0)

    def _room(self, tokens: int, requests: int = 1, hits: int = 0) -> bool:
        tree, allocator, page = self.caches.tree, self.caches.allocator, self.caches.sizes.page
        pages = -(-tokens // page) + (requests if page > 1 else 0)
        free, full = len(allocator.units), allocator.full_available_size()
        if not self.caches.sizes.disable:
            free += allocator.evictable_units(tree)
            full += tree.full_evictable_size()
        need = allocator.shape.units(pages, pages) + hits * allocator.units_of_sinks
        return bool(free >= need and full >= pages * page)

    def _make_room(self) -> None:
        while self.running and not self._room(len(self.running), len(self.running)):
            assert len(self.running) > 1 or self.chunked, "a request that fits does not fit"
            self._retract(self.running[-1])
        self._promise(len(self.running), len(self.running))

    def _batch(self, reqs: list[Req], mode: ForwardMode) -> ScheduleBatch:
        batch = ScheduleBatch(
            reqs=reqs,
            req_to_token_pool=self.caches.rows,
            token_to_kv_pool_allocator=self.caches.allocator,
            tree_cache=self.caches.tree,
            device="cpu",
            enable_overlap=self.overlap,
            model_config=SimpleNamespace(is_encoder_decoder=False),  # type: ignore[arg-type]
        )
        batch.forward_mode = mode
        return batch

    def _prefill(self, reqs: list[Req]) -> None:
        batch = self._batch(reqs, ForwardMode.EXTEND)
        batch.prefix_lens = [req.prefix_len for req in reqs]
        batch.extend_lens = [req.extend_len for req in reqs]
        batch.seq_lens = batch.seq_lens_cpu = torch.tensor([req.extend_end for req in reqs])
        batch.extend_num_tokens = sum(batch.extend_lens)
        alloc_for_extend(batch)
        for req in reqs:
            req.extend_batch_idx += 1
            req.is_retracted = False
        caches = self.caches
        if caches.prefills is None:
            plans = [Prefill(Kind.KNOWN, 0, 0, req.prefix_len, req.extend_len) for req in reqs]
        else:
            plans = caches.prefills.begin([(request_id(req), req) for req in reqs])
        self._flush()
        rows = torch.tensor([req.kv.req_pool_idx for req in reqs])
        sinks = sink_slots(rows, caches.tables, caches.windows)
        self.launched = [(None, None, False)] * len(reqs)  # type: ignore[list-item]
        for index in sorted(range(len(reqs)), key=lambda i: plans[i].kind == Kind.STAGED):
            req, plan = reqs[index], plans[index]
            tags = self._tags(req, req.extend_end, req.prefix_len)
            full, streaming = self._slots(req, req.extend_end)
            prefix = req.prefix_len
            caches.write(False, full[prefix:], tags[prefix:])
            assert (streaming[prefix:] > 0).all()
            caches.write(True, streaming[prefix:], tags[prefix:])
            if plan.kind == Kind.KNOWN:
                self._check_extend(prefix, tags, streaming, sinks[index])
            else:
                # Nothing is known of its layers, so all of them have all tokens.
                assert (streaming > 0).all(), "an undecided request lost a window"
                self._compare(caches.read(True, streaming), tags, "full")
                self.events[plan.kind.name] += 1
            self._compare_full(full, tags)
            if caches.prefills is not None:
                caches.full_rows.prefill(full[prefix:], [plan])
                caches.prefills.sets.bring()
            done = req is not self.chunked
            self.launched[index] = (req, self._next(self.written[request_id(req)]) if done else None, True)
            if done:
                self.running.append(req)

    def _decode(self, reqs: list[Req]) -> None:
        caches, batch = self.caches, self._batch(reqs, ForwardMode.DECODE)
        lengths = torch.tensor([req.kv.kv_committed_len for req in reqs])
        batch.seq_lens = batch.seq_lens_cpu = lengths
        batch.req_pool_indices = batch.req_pool_indices_cpu = torch.tensor(
            [req.kv.req_pool_idx for req in reqs]
        )
        with envs.SGLANG_SWA_EVICTION_INTERVAL.override(INTERVAL):
            alloc_for_decode(batch, token_per_req=1)
        for req in reqs:
            req.decode_batch_idx += 1
        self._flush()
        lengths = lengths + 1
        read = decode_slot_lists(batch.req_pool_indices, lengths, caches.tables, caches.windows)
        self.launched = []
        for req, length, slots in zip(reqs, lengths.tolist(), read, strict=True):
            tags = self._tags(req, length, length - 1)
            full, streaming = self._slots(req, length)
            caches.write(False, full[-1:], tags[-1:])
            assert streaming[-1] > 0
            caches.write(True, streaming[-1:], tags[-1:])
            if caches.prefills is not None:
                caches.full_rows.decode(full[-1:])
            seen = visible(length - 1, caches.sizes.sink, caches.sizes.recent)
            self._compare(caches.read(True, slots), tags[seen])
            self._compare_full(full, tags)
            self.launched.append((req, self._next(self.written[request_id(req)]), False))
        self.events["decode"] += 1

    def _compare_full(self, full: torch.Tensor, tags: torch.Tensor) -> None:
        if self.caches.sizes.full:
            self._compare(self.caches.read(False, full), tags, "full")

    def _process(self, launched: list[tuple[Req, int | None, bool]] | None) -> None:
        tree = self.caches.tree
        for req, token, prefill in launched or ():
            if req.finished() or req.is_retracted or token is None:
                continue
            req.output_ids.append(token)
            req.update_finish_state()
            if req.finished():
                self.running.remove(req)
                release_kv_cache(req, tree, checkpoint=True)
                self._over(req)
                self.events["finished"] += 1
            elif prefill:
                self._checkpoint(req)

    def _checkpoint(self, req: Req) -> None:
        wrappers.slide_after_chunk(checkpoint_kv_cache, req, self.caches.tree)

    def _over(self, req: Req) -> None:
        self.ended[req.rid] = req
        del self.known[request_id(req)], self.written[request_id(req)]
