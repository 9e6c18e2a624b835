"""How the KV budget is split between the full and the streaming pool. Pure arithmetic.

SGLang sizes its sliding-window pool by a fixed ratio (0.8), which gives nearly all that lazy layers
save back to a pool that stands empty. Here the split follows the length of the requests: a request of
T tokens holds T slots in the full pool and about w_recent in the streaming pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from lt_sglang.errors import LightTransferError

SPARE_SINK_SETS = 8
# With no full layer at all, the full pool holds positions, not bytes: 16 bytes of bookkeeping each.
MAX_VIRTUAL_TOKENS = 1 << 26


@dataclass(frozen=True)
class PoolSplit:
    """Sizes in tokens; ``sink_sets`` times w_sink rows stand at the tail of the streaming pool.

    requests: how many requests of ``expected_tokens`` fit at once (a float, before rounding).
    """

    full_tokens: int
    streaming_tokens: int
    sink_sets: int
    requests: float
    expected_tokens: int
    streaming_per_request: int


@dataclass(frozen=True)
class SplitInput:
    """full_bytes, streaming_bytes: KV bytes of one token in all full / all lazy layers of a rank.

    retained_tokens: LightTransferConfig.retained_tokens. chunk_tokens: the tokens one prefill batch
    writes before the window slides over them. expected_output_tokens: of expected_tokens, or None.
    eviction_interval: tokens by which SGLang lets a window slide at a time in decode
    (SGLANG_SWA_EVICTION_INTERVAL). staging_bytes: taken before anything is split (dynamic mode).
    """

    full_bytes: int
    streaming_bytes: int
    retained_tokens: int
    sink_tokens: int
    expected_tokens: int
    chunk_tokens: int
    context_tokens: int
    expected_output_tokens: int | None = None
    eviction_interval: int = 128
    staging_bytes: int = 0

    @property
    def streaming_per_request(self) -> int:
        """Slots a running request holds: its window and a headroom.

        Until it has decoded w_recent tokens, a request holds its prompt's last window (which the prefix
        cache can reuse) beside its new tokens; from then on the window slides in steps of the eviction
        interval. So the headroom is a short output whole; for a long one it falls with the share of its
        life that a request spends in its first window (twice the average, for requests in step); where
        the output is not known it is a quarter of a window.
        """
        output, window = self.expected_output_tokens, self.retained_tokens
        if output is None:
            headroom = max(self.eviction_interval, window // 4)
        elif output <= window:
            headroom = output
        else:
            headroom = min(window, window * window // output + self.eviction_interval)
        return min(self.expected_tokens, self.retained_tokens + headroom)

    @property
    def streaming_longest(self) -> int:
        """Slots that one request can hold at most, besides its chunk in flight, however long it is.

        The tree keeps the last window of its cached prefix or its prompt, and locks whole nodes: one of them
        may begin before the window, and is at most as long (SGLang cuts them so). Beside it the request holds
        a window of new tokens, which slides in steps of the eviction interval.
        """
        window, interval = self.retained_tokens, self.eviction_interval
        node = max(window, interval)
        return window + node + window + interval

    @property
    def streaming_fixed(self) -> int:
        """Slots for the prefill batch in flight, whatever the number of requests."""
        return self.chunk_tokens + 2


def split_budget(budget_bytes: int, given: SplitInput) -> PoolSplit:
    """Split ``budget_bytes`` so that both pools run full together at ``expected_tokens``.

    The streaming pool holds at least one request as long as the full pool, so that none which fits that is
    ended for memory. Raises LightTransferError if not even one prefill chunk and one window fit.
    """
    per_request = given.streaming_per_request
    fixed_bytes = given.streaming_bytes * (given.streaming_fixed + SPARE_SINK_SETS * given.sink_tokens)
    fixed_bytes += given.staging_bytes
    request_bytes = given.full_bytes * given.expected_tokens + given.streaming_bytes * (
        per_request + given.sink_tokens
    )
    left = budget_bytes - fixed_bytes
    requests = left / request_bytes
    longest = min(given.context_tokens, given.streaming_longest)
    if requests * per_request < longest and not given.full_bytes:
        # Positions cost nothing, so any request may come; the windows of one must fit.
        room = left - given.streaming_bytes * longest
        requests = requests if room >= given.streaming_bytes * given.sink_tokens * int(requests) else 0.0
    elif requests * per_request < min(requests * given.expected_tokens, longest):
        # What the longest request needs is there whatever the number of requests is (see _sizes). It is no
        # longer than the full pool.
        request_bytes -= given.streaming_bytes * per_request
        requests = max(
            (left - given.streaming_bytes * longest) / request_bytes,
            left / (request_bytes + given.streaming_bytes * given.expected_tokens),
        )
    full_tokens = int(requests * given.expected_tokens)
    if not given.full_bytes:
        full_tokens = min(max(full_tokens, 2 * given.context_tokens), MAX_VIRTUAL_TOKENS)
    if requests <= 0 or full_tokens < given.retained_tokens:
        raise LightTransferError(
            f"KV memory: {budget_bytes / 2**20:.0f} MiB do not hold one prefill chunk of "
            f"{given.chunk_tokens} tokens and one window; raise --mem-fraction-static or lower "
            "--chunked-prefill-size"
        )
    return _sizes(full_tokens, requests, given)


def split_tokens(full_tokens: int, given: SplitInput) -> PoolSplit:
    """The split for a full pool of exactly ``full_tokens`` (``--max-total-tokens``)."""
    return _sizes(full_tokens, full_tokens / given.expected_tokens, given)


def split_bytes(split: PoolSplit, given: SplitInput) -> int:
    """Bytes that ``split`` takes; never above the budget it was made from."""
    streaming = split.streaming_tokens + split.sink_sets * given.sink_tokens
    return given.staging_bytes + split.full_tokens * given.full_bytes + streaming * given.streaming_bytes


def _longest(full_tokens: int, given: SplitInput) -> int:
    """Slots of the longest request that a full pool of ``full_tokens`` takes."""
    return min(full_tokens, given.context_tokens, given.streaming_longest)


def _sizes(full_tokens: int, requests: float, given: SplitInput) -> PoolSplit:
    windows = max(int(requests * given.streaming_per_request), _longest(full_tokens, given))
    streaming = windows + given.streaming_fixed
    return PoolSplit(
        full_tokens=full_tokens,
        streaming_tokens=streaming,
        sink_sets=int(requests) + SPARE_SINK_SETS if given.sink_tokens else 0,
        requests=requests,
        expected_tokens=given.expected_tokens,
        streaming_per_request=given.streaming_per_request,
    )
