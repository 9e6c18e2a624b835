"""SGLang's unified radix cache, taught that lazy layers also need a request's first tokens.

The tree, its eviction and its locks stay stock: they guarantee the last ``sliding_window_size`` tokens
of a prefix in the streaming pool. What they may drop are the sinks. So, before anything can drop
positions 0 .. w_sink - 1 of a request, the request takes a set of sink rows (SinkStore), and a cached
prefix longer than the window is a hit only while the set of its first tokens is still stored.

Every way in which stock SGLang can free a streaming slot of a running request, and where it is met:

    free_swa_out_of_window_slots, a request's own slots in decode    evict_sliding_windows
    the same, between prefill chunks and at the end of a prefill     checkpoint, slide_window
    eviction of tree nodes beyond the locked window                  checkpoint (the lock moves there)
    early release of the prompt's lock in decode                     release_swa_prefix_lock
    a hit whose head was evicted earlier                             match_prefix
    advance_unpublished_req, PD disaggregation only                  refused (lt_sglang/refusals.py)

And every way in which a chunk of a prefill is not published, so that stock SGLang keeps its slots:

    the request is barred from the tree (Req.skip_radix_cache_insert), the tree is disabled, or no slot is
    left for its sinks                                              slide_window, after every chunk

With HiCache (--enable-hierarchical-cache) a prefix is a hit where its tokens, its window and its sinks are on
the device or in host memory; cache/host_stack.py has the pools.

Source: sglang/srt/mem_cache/unified_radix_cache.py and common.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult, zero_match_result
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import register_stack_strategy
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.components.base import CacheTransferPhase
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from lt_sglang.cache.host_stack import HostStack, HostTier
from lt_sglang.config import CONFIG_KEY
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.host import NO_STORAGE
from lt_sglang.memory.kv_keys import determined_by_key, of_weights, private_key, request_id, shared_key
from lt_sglang.memory.sinks import SinkKey, SinkStore

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class LightTransferRadixCache(UnifiedRadixCache):
    """UnifiedRadixCache that keeps the sinks of every request that outgrew its window.

    Attributes:
        sinks: the sink sets.
        lazy_layers: those of every request; in dynamic mode each has its own.
        finished_requests: how many have finished, health checks aside; for metrics.
        next_check: when an idle scheduler looks at the stores again, of time.monotonic().
        flush_sinks: does the store's queued copies on the forward stream; set where HiCache needs it.
        host: with HiCache, what is in host memory; else None.
    """

    def __init__(self, params: CacheInitParams, sinks: SinkStore, lazy_layers: tuple[int, ...] = ()) -> None:
        self.sinks = sinks
        self.flush_sinks: Callable[[], None] = lambda: None
        self.host: HostTier | None = None
        self.lazy_layers = lazy_layers
        self.finished_requests = 0
        self.next_check = 0.0
        super().__init__(params)
        self.token_to_kv_pool_allocator.tree_cache = self
        window = self.sliding_window_size
        if window is None or window < 1:
            raise LightTransferError("radix cache: lazy layers need a sliding window, SGLang passed none")
        # One forward writes the keys of up to `window` earlier tokens and its own.
        self._kept_tokens = int(window)

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """As UnifiedRadixCache; a miss if the hit outlived its sinks."""
        if params.req is not None:
            # K and V that it computes from here on are of these weights.
            params.req.lighttransfer_weights = self.sinks.weights
            params.req.lighttransfer_sinks = None
        result = super().match_prefix(params)
        if longest_hit(result) <= self._kept_tokens:
            return result
        sinks = self._sinks_of(params.key)
        # What is in host memory is brought when it is admitted: here nothing holds the prefix yet.
        if not self.sinks.touch(sinks) and not self.sinks.on_host(sinks):
            return zero_match_result(self, result, extra_key=params.key.extra_key)
        if params.req is not None:
            params.req.lighttransfer_sinks = sinks
        return result

    def bring_sinks(self, req: Req, hold: Callable[[], AbstractContextManager[None]]) -> bool:
        """``req`` may be admitted: whether the sinks of its hit are on the device, until the batch is formed.

        hold: keeps what the request has hit, on both sides, while a set from host memory takes its slots.
        """
        sinks = getattr(req, "lighttransfer_sinks", None)
        if sinks is None or req.kv.holds_kv:
            return True
        if not self.sinks.touch(sinks):
            with hold():
                if not self.sinks.restore(sinks):
                    return False
        self.sinks.promise(sinks)
        return True

    def tokens_to_load(self, req: Req) -> int:
        """Full slots that HiCache would load for the hit of ``req``: those that are not on the device."""
        (transfer,) = self.tree_core.build_hicache_transfers(
            ComponentType.FULL, req.best_match_node, CacheTransferPhase.LOAD_BACK
        )
        return len(transfer.host_indices)

    def prefix_device_indices(self, req: Req) -> torch.Tensor:
        """As UnifiedRadixCache; called once as a request with a cached prefix is admitted."""
        req.lighttransfer_prefix = req.prefix_len
        if req.prefix_len > self._kept_tokens:
            # The prefix is the tree's, so its sinks are, whatever else the request brings.
            adopted = self.sinks.adopt(request_id(req), self._shared_key_of(req), _row_of(req))
            if not adopted:
                raise RuntimeError(f"request {req.rid}: the sinks of its cached prefix are gone")
        return super().prefix_device_indices(self._as_filed(req))

    def init_hicache(self, server_args: Any, params: CacheInitParams) -> None:
        """As UnifiedRadixCache, over pools of ours."""
        register_stack_strategy(HostStack())
        super().init_hicache(server_args, params)

    @property
    def slot_flags(self) -> torch.Tensor | None:
        """bool [full slots] that HiCache keeps with them, or None."""
        return None

    def keep_on_host(self, host: HostTier) -> None:
        """HiCache was built: sinks are copied there as well."""
        self.host = host
        self.sinks.host = host.sinks

    def ready_to_load_host_cache(self) -> int:
        """As UnifiedRadixCache; the sinks that lie in slots it loads into are copied before."""
        controller = self.cache_controller
        if controller is not None and controller.load_queue:
            self.flush_sinks()
        return int(super().ready_to_load_host_cache())

    def finish_copies(self) -> None:
        """Wait until HiCache has copied all it was told to, on every rank."""
        controller = self.cache_controller
        if controller is None:
            return
        self.writing_check(write_back=True)
        for ack in controller.ack_load_queue:
            ack.finish_event.synchronize()
        self.loading_check()

    def attach_storage_backend(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """Refused: a page in storage has no sinks."""
        return False, NO_STORAGE

    def checkpoint(self, req: Req, *, up_to: int, **kwargs: Any) -> None:
        """As UnifiedRadixCache; a request whose sinks cannot be kept stays out of the tree."""
        if not self.disable and up_to > self._kept_tokens and not self._keep_sinks(req):
            return
        super().checkpoint(self._as_filed(req), up_to=up_to, **kwargs)

    def slide_window(self, req: Req) -> None:
        """Let go of what the prefill chunk that ends at ``req.extend_end`` left behind.

        Called after every chunk, published or not (hooks/wrappers.py); does nothing where checkpoint did it.
        A request that kept its slots would fill the streaming pool with its prompt and never go on.
        """
        self.evict_sliding_windows(req, req.extend_end - 1)

    def evict_sliding_windows(self, req: Req, pre_len: int, *, eviction_interval: int = 1) -> None:
        """As UnifiedRadixCache; keeps the sinks, and lets the prompt's window go.

        SGLang does the latter only if SGLANG_OPT_RELEASE_PREFILL_SWA is set (ScheduleBatch.maybe_evict_swa):
        without it a request holds two windows to its end, and long outputs do not fit the streaming pool.
        """
        if pre_len > self._kept_tokens and not self._keep_sinks(req):
            # No set is free. Its own slots keep the sinks; the window slides over the tokens after them.
            req.kv.swa_evict_floor = self.sinks.slots_of_set
        super().evict_sliding_windows(req, pre_len, eviction_interval=eviction_interval)
        if req.decode_batch_idx >= self._kept_tokens:
            self.release_swa_prefix_lock(req)

    def release_swa_prefix_lock(self, req: Req) -> None:
        """As UnifiedRadixCache, once the sinks are safe, and of a prompt that fits the window as well.

        SGLang keeps such a prompt's window to the request's end: its lock ends at the root, without an id. As
        with longer prompts, who asks the same again while nobody holds that window computes it anew.
        """
        lock = (self.session.borrowed_slot(req) or req).lock
        if lock is not None and not lock.swa_released and self._keep_sinks(req):
            self.release_swa(lock)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        """As UnifiedRadixCache; the request gives its sink set back."""
        self.report(req)
        self.sinks.release(request_id(req))
        req.kv.swa_evict_floor = req.lighttransfer_prefix = 0
        self.next_check = 0.0
        if not req.finished():
            self.token_to_kv_pool_allocator.count_retraction()
        elif not is_health_check_generate_req(req):
            self.finished_requests += 1
        super().on_release(req, checkpointed=checkpointed)

    def report(self, req: Req) -> None:
        """Add ``meta_info.lighttransfer`` to the answer of a request that asks for it, once it is known.

        Source: sglang/srt/managers/scheduler_components/output_streamer.py, Req.customized_info; sent as
        hooks/answers.py says.
        """
        asked = req.sampling_params.custom_params
        known = req.customized_info or {}
        # SGLang takes whatever a client sends.
        if not isinstance(asked, Mapping) or not asked.get(CONFIG_KEY) or CONFIG_KEY in known:
            return
        found = self.describe(req)
        if found is not None:
            req.customized_info = {**known, CONFIG_KEY: [found]}

    def describe(self, req: Req) -> dict[str, object] | None:
        """What a request is told of its layers (docs/serving.md); None while it is not known."""
        return {"lazy_layers": list(self.lazy_layers), "laziness": None, "origin": "static"}

    def chunk_limit(self, req: Req) -> int | None:
        """Most tokens of a waiting request's next prefill chunk; None: as many as SGLang likes."""
        return None

    def reset(self) -> None:
        """As UnifiedRadixCache; forgets the sinks no running request uses."""
        super().reset()
        self.sinks.clear()

    def sanity_check(self) -> None:
        """As UnifiedRadixCache, and the sink store's own check; raises on the first fault."""
        super().sanity_check()
        wrong = self.sinks.check_integrity()
        if wrong:
            raise RuntimeError("; ".join(wrong))

    def _keep_sinks(self, req: Req) -> bool:
        request = request_id(req)
        if self.sinks.holds(request):
            return True

        def slots() -> torch.Tensor:
            row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : self.sinks.sink_tokens]
            return self.token_to_kv_pool_allocator.full_to_swa_index_mapping[row.to(torch.int64)]

        kept = self.sinks.capture(
            request,
            self._key_of(req),
            _row_of(req),
            slots,
            # Without a prefix cache nothing would tie it to the K and V of its time.
            kept=not self.disable and determined_by_key(req),
        )
        if kept:
            self._free_own_sinks(req)
        return kept

    def _free_own_sinks(self, req: Req) -> None:
        """A set was found late: free the slots that held the sinks while the window slid behind them."""
        first, floor = req.kv.cache_protected_len, req.kv.swa_evict_floor
        if first < floor <= req.kv.get_evicted_seqlen(ComponentType.SWA):
            slots = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, first:floor]
            self.token_to_kv_pool_allocator.free_swa_segment(slots, start_pos=first)
        req.kv.swa_evict_floor = 0

    def _sinks_of(self, key: RadixKey) -> SinkKey:
        return shared_key(key.token_ids[: self.sinks.sink_tokens], key.extra_key, key.cache_salt)

    def _key_of(self, req: Req) -> SinkKey:
        """Under what the request's own first tokens are filed."""
        key = self._shared_key_of(req)
        weights = getattr(req, "lighttransfer_weights", None)
        if weights is None or not determined_by_key(req):
            return private_key(key, request_id(req))
        if not self.disable:
            # Old K and V stay until the cache is flushed, in full and lazy layers and sinks alike.
            return key
        if weights != self.sinks.weights:
            # They changed since it was admitted: its first tokens may be of either weights, or of both.
            return private_key(key, request_id(req))
        return of_weights(key, weights)

    def _shared_key_of(self, req: Req) -> SinkKey:
        count = self.sinks.sink_tokens
        tokens = req.origin_input_ids[:count]
        if len(tokens) < count:
            tokens = tokens + req.output_ids[: count - len(tokens)]
        return shared_key(tokens, self._extra_key_of(req), req.cache_salt)

    def _extra_key_of(self, req: Req) -> str | None:
        """Under which extra key the K and V of the request are filed."""
        given: str | None = req.extra_key
        return given

    def _as_filed(self, req: Req) -> Req:
        """The request as SGLang's tree is to see it, with that extra key."""
        return req


def hit_length(result: MatchResult) -> int:
    """Tokens of a match, on the device and in host memory."""
    return result.device_prefix_len + result.host_hit_length


def longest_hit(result: MatchResult) -> int:
    """The same, and what a load may add: a window from the host shows full layers that are on the device."""
    return max(hit_length(result), result.full_kv_hit_length if result.swa_host_hit_length else 0)


def _row_of(req: Req) -> Any:
    return lambda: req.kv.req_pool_idx
