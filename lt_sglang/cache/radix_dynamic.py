"""The prefix cache of dynamic mode: one name space a layer set (layers/layer_sets.py).

A cached prefix is K and V of its writer's layers; a request may only reuse it with the writer's set. So the
tree is entered under the uid of a set, and a hit that does not cover the whole first block is a miss. Which
sets are tried tells how prompts begin (layers/prefix_index.py); the first that has a hit is taken.

A request that shares only a beginning with others has its own layers selected. Not so with a list, by which
all have the same: if the rest of its prompt fits into a window, its prefill stops at its branching point,
where it parts from the others. The list is applied there, and the next prompt with this beginning and a short
rest has a hit. So in each name space all rows up to one token had full attention, and none behind it.

A request that waits undecided between two chunks stays out of the tree: which layers its K and V belong to is
not known yet. It keeps its streaming slots until it is decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.utils import get_device_module

from lt_sglang.cache.radix_static import LightTransferRadixCache, hit_length
from lt_sglang.layers.chosen import Remembered, remember, remembered
from lt_sglang.layers.full_rows import FullRows
from lt_sglang.layers.layer_sets import LayerSet
from lt_sglang.layers.prefill import PrefillTracker, is_copy
from lt_sglang.layers.prefix_index import PromptStart
from lt_sglang.memory.kv_keys import request_id
from lt_sglang.memory.sinks import SinkStore

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

NOWHERE = "lt:none"
# Sets that are tried for a prompt. The right one is the first unless its K and V are gone.
TRIES = 4
# Further sets among which one with a branching point is looked for.
LOOKED_THROUGH = 64


class DynamicRadixCache(LightTransferRadixCache):
    """LightTransferRadixCache that keeps the layer sets apart."""

    def __init__(
        self, params: CacheInitParams, sinks: SinkStore, prefills: PrefillTracker, full_rows: FullRows
    ) -> None:
        self.prefills = prefills
        self.full_rows = full_rows
        super().__init__(params, sinks)

    @property
    def slot_flags(self) -> torch.Tensor:
        """As LightTransferRadixCache: how rows were computed."""
        return self.full_rows.table

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """As LightTransferRadixCache, within the sets of prompts that begin like the key."""
        key, req, had = params.key, params.req, remembered(params.req)
        if had is None:
            needed, prompt = self.prefills.hit_tokens(len(key.token_ids)), self._prompt_start(key)
            sets = self._sets_to_try(prompt)
        else:
            needed = had.full_rows
            prompt, sets = self._comes_back(req, had)
        copied: LayerSet | None = None
        for entry in sets:
            # A copy reads all but its last token from the cache and computes that one with streaming
            # attention, where the first run had full attention; and SGLang sends a request with n > 1 once
            # ahead, to fill the cache. So each copy is computed as that one was, and selected for itself.
            if had is None and req is not None and is_copy(req, entry):
                copied = entry
                break
            result = super().match_prefix(replace(params, key=_within(key, _name(entry.uid, key.extra_key))))
            found = hit_length(result)
            if had is None and self.prefills.refuses(entry, len(key.token_ids), found):
                continue
            if found >= needed and (had is None or self._rows_unchanged(had, result)):
                _bind(req, entry, prompt)
                return result
        _bind(req, None, None)
        if req is not None and had is None and prompt is not None and not self.disable:
            self.prefills.branch(req, prompt, copied, most=len(key), page_size=self.page_size)
        # Nothing is stored there, so SGLang keeps no window where this prompt parts from another either.
        return super().match_prefix(replace(params, key=_within(key, NOWHERE)))

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Any] | None:
        """As UnifiedRadixCache; a miss if nothing is loaded: what is left may not cover the first block."""
        req = params.req
        assert req is not None
        loaded: tuple[int, Any] | None = super().init_load_back(params)
        if loaded is None or loaded[0] >= params.host_hit_length:
            return loaded
        _bind(req, None, None)
        req.prefix_len = req.kv.cache_protected_len = 0
        return 0, self.root_node_handle(NOWHERE)

    def touch_prefix(self, key: RadixKey) -> None:
        """As UnifiedRadixCache, in the name space of the set that is tried first.

        SGLang does this for 128 waiting requests at a time.
        """
        entry = next(self._sets_of(self._prompt_start(key)), None)
        if entry is not None:
            super().touch_prefix(_within(key, _name(entry.uid, key.extra_key)))

    def prefix_device_indices(self, req: Req) -> torch.Tensor:
        """As LightTransferRadixCache; the request takes over the layer set of its cached prefix."""
        if req.prefix_len:
            entry, prompt = _bound(req)
            had = remembered(req)
            self.prefills.inherit(request_id(req), entry, prompt, had=had)
        return super().prefix_device_indices(req)

    def checkpoint(self, req: Req, *, up_to: int, **kwargs: Any) -> None:
        """As LightTransferRadixCache; an undecided request stays out of the tree."""
        if self._is_known(req):
            super().checkpoint(req, up_to=up_to, **kwargs)

    def evict_sliding_windows(self, req: Req, pre_len: int, *, eviction_interval: int = 1) -> None:
        """As LightTransferRadixCache; an undecided request keeps all it has."""
        if self._is_known(req):
            super().evict_sliding_windows(req, pre_len, eviction_interval=eviction_interval)

    def _is_known(self, req: Req) -> bool:
        # True once the forward that selects the layers is launched, maybe before it ends. What is freed then
        # changes the device's tables only behind that forward (upstream/recorded.py, shared_read_ends).
        entry = self.prefills.sets.of(request_id(req))
        return entry is not None and entry.known

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        """As LightTransferRadixCache; the request gives its layer set back, or remembers it if retracted."""
        self.report(req)
        if not req.finished():
            remember(req, self.prefills.memory_of(request_id(req), lambda: self._inherited_rows(req)))
        if req.finished() and not is_health_check_generate_req(req):
            self.prefills.sets.count(request_id(req))
        super().on_release(req, checkpointed=checkpointed)
        self.prefills.release(request_id(req), req.kv.req_pool_idx)

    def reset(self) -> None:
        """As LightTransferRadixCache; forgets which blocks had which sets."""
        super().reset()
        self.prefills.sets.clear()

    def sanity_check(self) -> None:
        """As LightTransferRadixCache, and the layer sets' own check."""
        super().sanity_check()
        wrong = self.prefills.sets.check_integrity()
        if wrong:
            raise RuntimeError("; ".join(wrong))

    def describe(self, req: Req) -> dict[str, object] | None:
        """As LightTransferRadixCache; a request that was retracted shows what it had at first."""
        return self.prefills.sets.describe(request_id(req))

    def chunk_limit(self, req: Req) -> int | None:
        """As LightTransferRadixCache; PrefillTracker.chunk_limit."""
        return self.prefills.chunk_limit(req)

    def _comes_back(self, req: Req, had: Remembered) -> tuple[PromptStart | None, Iterator[LayerSet]]:
        """Of a retracted request, its prompt, and the one set whose K and V it may read: the one it had."""
        if had.default:
            return None, iter((self.prefills.sets.default,))
        prompt = self.prefills.prompt_start(req.origin_input_ids, req.extra_key, req.cache_salt)
        own = self.prefills.sets.stored_set(had.uid)
        return prompt, iter(() if own is None else (own,))

    def _rows_unchanged(self, had: Remembered, found: MatchResult) -> bool:
        """Whether all rows that had full attention then still have it: none was evicted and made anew."""
        if had.default:
            return True
        if self.ongoing_load_back and self.cache_controller.load_queue:
            return False  # the rows of a load that has not begun are not there yet
        self._wait_for_loads()
        slots = self.path_device_indices(found.last_device_node)[: had.full_rows]
        return self.full_rows.leading(slots) == had.full_rows

    def _wait_for_loads(self) -> None:
        """HiCache writes the flags of rows that it loads on a stream of its own."""
        if self.ongoing_load_back:
            stream = self.cache_controller.l2_transfer_engine.host_to_device_stream
            get_device_module().current_stream().wait_stream(stream)

    def _inherited_rows(self, req: Req) -> int:
        """Rows of ``req`` in the tree, from the first on, that were computed with full attention."""
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : req.kv.cache_protected_len]
        return self.full_rows.leading(row.to(torch.int64))

    def _extra_key_of(self, req: Req) -> str | None:
        # Also of its sinks: their rows belong to the streaming banks of one layer set, whoever shares them.
        entry = self.prefills.sets.of(request_id(req))
        assert entry is not None
        return _name(entry.uid, req.extra_key)

    def _as_filed(self, req: Req) -> Req:
        filed: Any = _Filed(req, self._extra_key_of(req))
        return filed

    def _sets_of(self, prompt: PromptStart | None) -> Iterator[LayerSet]:
        sets = self.prefills.sets
        return iter((sets.default,)) if prompt is None else sets.find(prompt)

    def _sets_to_try(self, prompt: PromptStart | None) -> Iterator[LayerSet]:
        """The first few; with a list, also the next one whose branching point this prompt reaches."""
        sets = self._sets_of(prompt)
        yield from islice(sets, TRIES)
        if prompt is not None and self.prefills.listed:
            agreed = self.prefills.sets.agreed(prompt)
            left = (entry for entry in islice(sets, LOOKED_THROUGH) if 0 < entry.branching_seqlen <= agreed)
            yield from islice(left, 1)

    def _prompt_start(self, key: RadixKey) -> PromptStart | None:
        """How the key's prompt begins; None if it is too short to have layers of its own."""
        if len(key.token_ids) <= self.prefills.block_tokens:
            return None
        return self.prefills.prompt_start(key.token_ids, key.extra_key, key.cache_salt)


class _Filed:
    """A request with another extra key; all else, and whatever is assigned, is the request's own.

    SGLang's tree makes the keys of what it stores from ``req.extra_key``, deep inside of methods that it
    offers whole.
    """

    def __init__(self, req: Req, extra_key: str | None) -> None:
        vars(self).update(_req=req, extra_key=extra_key)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_req"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_req"], name, value)


def _name(uid: int, extra_key: str | None) -> str:
    return f"lt:{uid}:{extra_key or ''}"


def _within(key: RadixKey, extra_key: str) -> RadixKey:
    return RadixKey(key.token_ids, extra_key, key.is_bigram, key.limit, key.cache_salt)


def _bind(req: Any, entry: LayerSet | None, prompt: PromptStart | None) -> None:
    """Remember with the request, which may never be admitted, whose K and V it was shown for ``prompt``."""
    if req is not None:
        req.lighttransfer_hit = entry, prompt
        req.lighttransfer_branching_seqlen = 0


def _bound(req: Any) -> tuple[LayerSet | None, PromptStart | None]:
    found: tuple[LayerSet | None, PromptStart | None] = getattr(req, "lighttransfer_hit", (None, None))
    return found
