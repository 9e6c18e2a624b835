"""Sees a queue that can never move, and says which request to end.

Admission and the split of the memory are meant to make this impossible: every request that SGLang takes fits
the pools alone. If they fail, or a feature of SGLang's holds a request back for ever, the scheduler would
pass its empty rounds in silence, and /health_generate would still say 200. So: if nothing has run for
STUCK_SECONDS and ROUNDS rounds while requests wait, the one that the others wait for is ended with 503.

Source: sglang/srt/managers/scheduler.py (_poll_timeout_aborts: rank 0 decides, all ranks follow).
"""

from __future__ import annotations

import logging
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import AbortReq

logger = logging.getLogger(__name__)

# Longer than anything a scheduler waits for without running, such as an adapter's weights.
STUCK_SECONDS = 5.0
ROUNDS = 100


class QueueWatch:
    """Looks at a scheduler once a round; host state only."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._rounds = 0

    def look(self, scheduler: Any) -> list[AbortReq]:
        """The requests to abort now; nearly always none."""
        if not _stands_still(scheduler):
            self._since = None
            return []
        now = time.monotonic()
        if self._since is None:
            self._since, self._rounds = now, 0
        self._rounds += 1
        if self._rounds < ROUNDS or now - self._since < STUCK_SECONDS:
            return []
        self._since = None
        return [_end(scheduler)]


def _stands_still(scheduler: Any) -> bool:
    """Whether the round before found requests, nothing that runs, and nothing to run."""
    if not scheduler.waiting_queue and scheduler.chunked_req is None:
        return False
    last = scheduler.last_batch
    return (
        scheduler.running_batch.is_empty()
        and (last is None or last.is_empty())
        and not getattr(scheduler, "result_queue", None)
        and not scheduler._engine_paused
    )


def _end(scheduler: Any) -> AbortReq:
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    req = scheduler.chunked_req if scheduler.chunked_req is not None else scheduler.waiting_queue[0]
    allocator, tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    free = len(allocator.units) + allocator.evictable_units(tree)
    full = allocator.full_available_size() + tree.full_evictable_size()
    limit = f" and {full} of at most {allocator.size_full} tokens" if allocator.full_is_limited else ""
    message = (
        f"Nothing else runs, and this request cannot start or go on: {len(req.origin_input_ids)} prompt "
        f"tokens and up to {req.sampling_params.max_new_tokens} new ones, with {free} of "
        f"{allocator.units.size} units of KV memory free{limit}."
    )
    logger.error("LightTransfer: request %s is ended with 503: %s", req.rid, message)
    reason = FINISH_ABORT(message, HTTPStatus.SERVICE_UNAVAILABLE)
    if req is scheduler.chunked_req:
        req.discard_output_reason = reason  # what SGLang tells the client of a prompt it ends between chunks
    return AbortReq(rid=req.rid, abort_message=message, finished_reason=reason.to_json())
