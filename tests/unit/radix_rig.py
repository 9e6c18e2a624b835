"""A real LightTransferRadixCache over small CPU pools, driven as SGLang's scheduler does; no server."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.sampling.sampling_params import SamplingParams

from lt_sglang.cache.radix_static import LightTransferRadixCache
from tests.pools import make_pools

SINKS, WINDOW = 4, 20


class Rig:
    """The cache, its pools, and requests that move through them a prefill chunk or a token at a time."""

    def __init__(self, *, disable: bool = False, sets: int = 6) -> None:
        pools = make_pools(1200, sets, SINKS, requests=10, context=512, window=WINDOW + 1)
        self.rows, self.allocator, self.sinks = pools.rows, pools.allocator, pools.sinks
        self.flat = pools.flat
        params = pools.cache_params(WINDOW, disable)
        self.cache = self._build(params)

    def _build(self, params: Any) -> LightTransferRadixCache:
        return LightTransferRadixCache(params, self.sinks)

    def request(self, rid: str, tokens: Sequence[int], **fields: Any) -> Req:
        """One that waits."""
        req = Req(rid, "", array("q", tokens), SamplingParams(max_new_tokens=8), vocab_size=1000, **fields)
        req.sampling_params.normalize(None)
        return req

    def admit(self, req: Req, chunk: int | None = None) -> Req:
        """Match its prefix, give it a row and slots for (the first chunk of) the rest."""
        req.init_next_round_input(self.cache)
        assert self.cache.bring_sinks(req, nullcontext)
        self.rows.alloc([req])
        req.lock = self.cache.lock(req.last_node)
        if req.prefix_len:  # SGLang asks for none else
            prefix = self.cache.prefix_device_indices(req)
            self.rows.write((req.kv.req_pool_idx, slice(0, req.prefix_len)), prefix.to(torch.int32))
        self._extend(req, chunk)
        return req

    def prefilled(self, req: Req) -> Req:
        """Admitted, its whole prompt computed and published."""
        self.admit(req)
        checkpoint_kv_cache(req, self.cache)
        return req

    def decode(self, req: Req, token: int = 7, steps: int = 1) -> None:
        """Tokens are sampled and their K and V written; the window slides."""
        for _ in range(steps):
            req.output_ids.append(token)
            req.decode_batch_idx += 1
            end = len(req.origin_input_ids) + len(req.output_ids) - 1
            self.cache.evict_sliding_windows(req, end)
            (slot,) = self.allocator.alloc(1)
            self.rows.write((req.kv.req_pool_idx, end), slot.to(torch.int32))
            req.kv.kv_allocated_len = req.kv.kv_committed_len = end + 1

    def finish(self, req: Req) -> None:
        """It ends, and its K and V go to the tree."""
        req.finished_reason = FINISH_LENGTH(len(req.output_ids))
        release_kv_cache(req, self.cache, checkpoint=True)

    def retract(self, req: Req) -> None:
        """It gives all back and waits again."""
        release_kv_cache(req, self.cache, checkpoint=False)
        req.reset_for_retract()

    def check(self) -> None:
        """Raise on the first fault of the cache's own checks and the store's."""
        assert not self.sinks.check_integrity()
        if not self.cache.disable:
            self.cache.sanity_check()

    def set_of(self, req: Req) -> int:
        """Index of its sink set on the device, or -1."""
        self.sinks.flush(self.flat.copy_rows)
        return int(self.sinks.set_of[req.kv.req_pool_idx])

    def _extend(self, req: Req, chunk: int | None) -> None:
        total = len(req.full_untruncated_fill_ids)
        req.extend_end = total if chunk is None else min(req.prefix_len + chunk, total)
        slots = self.allocator.alloc(req.extend_end - req.prefix_len)
        self.rows.write((req.kv.req_pool_idx, slice(req.prefix_len, req.extend_end)), slots.to(torch.int32))
        req.kv.kv_allocated_len = req.kv.kv_committed_len = req.extend_end
