"""How much memory there is, and the longest request it holds. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.demand import Demand
from lt_sglang.memory.units import UnitShape

# Of a slot in SGLang's tables: the full-to-streaming table, the list of free units and a copy as it grows.
TABLE_BYTES = 24
# With no full layer at all, full slots are positions, not bytes: 16 bytes of bookkeeping each.
MAX_POSITIONS = 1 << 26
# A position's entry in the list of free ones, and its streaming slot.
POSITION_BYTES = 16


@dataclass(frozen=True)
class Sizes:
    """Of the KV memory of one rank.

    units: pages of ``demand.page_size`` tokens in ``shape.lanes`` layers. unit_bytes: of K and V of one.
    demand: what requests take. full_limit: most full slots in use at once, or None. longest: tokens of the
    longest request that is taken.
    """

    shape: UnitShape
    units: int
    unit_bytes: int
    demand: Demand
    full_limit: int | None
    longest: int

    @property
    def streaming_slots(self) -> int:
        """Streaming slots, if they had all units."""
        return self.units // self.shape.streaming_units * self.demand.page_size

    @property
    def full_slots(self) -> int:
        """Full slots, if they had all units."""
        if not self.shape.full_units:
            assert self.full_limit is not None
            return self.full_limit
        return self.units // self.shape.full_units * self.demand.page_size

    def requests(self, prompt: int, output: int) -> float:
        """How many requests of ``prompt`` + ``output`` tokens run at once, one of them in its prefill."""
        first = self.demand.of_new(prompt, output)
        if first > self.units:
            return self.units / first
        return 1 + (self.units - first) / self.demand.of_decoding(prompt, output)

    def describe(self) -> str:
        """For the log."""
        shape, page = self.shape, self.demand.page_size
        limit = "" if self.full_limit is None else f", at most {self.full_limit} tokens in full layers"
        lists = ""
        if shape.parts > 2:
            lists = (
                f"; {shape.full_layers} and {shape.lazy_layers} have no common divisor above {shape.lanes}, "
                f"so each step writes {shape.full_units + shape.streaming_units} index lists instead of 2"
            )
        return (
            f"{self.units} units of {page} x {shape.lanes} rows, "
            f"{self.units * self.unit_bytes / 2**30:.2f} GiB per rank; a token takes {shape.full_units} for "
            f"{shape.full_layers} full and, within a window, {shape.streaming_units} for {shape.lazy_layers} "
            f"lazy layers; requests of up to {self.longest} tokens{limit}{lists}"
        )


def size_memory(  # noqa: PLR0913 - facts of SGLang that only the caller has
    budget_bytes: int,
    shape: UnitShape,
    config: LightTransferConfig,
    *,
    token_layer_bytes: int,
    page_size: int,
    chunk_tokens: int,
    context_tokens: int,
    interval: int,
    full_limit: int | None,
) -> Sizes:
    """Sizes that ``budget_bytes`` of KV memory allow on one rank.

    Args:
        budget_bytes: for K, V and the tables of slots.
        shape: of the layers.
        config: windows and mode.
        token_layer_bytes: of K and V of one token in one layer.
        page_size: SGLang's.
        chunk_tokens: most tokens of a prefill batch.
        context_tokens: of the model.
        interval: tokens by which SGLang lets a window slide at a time (SGLANG_SWA_EVICTION_INTERVAL).
        full_limit: most tokens in full layers, or None.

    Raises:
        LightTransferError: not even one prefill chunk and one window fit.
    """
    demand = Demand(
        shape,
        page_size,
        window=config.retained_tokens,
        interval=interval,
        chunk=chunk_tokens,
        context=context_tokens,
        sink_tokens=config.sink_tokens,
    )
    unit_bytes = page_size * shape.lanes * token_layer_bytes
    tables = page_size * (TABLE_BYTES + 4 * (shape.parts - 1))
    units = max(budget_bytes // (unit_bytes + tables) - 1, 0)  # one is padding
    if full_limit is not None:
        # Every streaming slot, but those of sinks, belongs to a full one.
        full_limit = full_limit // page_size * page_size
        sinks = demand.units(0, config.sink_tokens) * (1 + full_limit // config.lazy_tokens)
        units = min(units, demand.units(full_limit, full_limit) + 2 * sinks)
    if not shape.full_layers:
        # Positions hold no K and V. So there are as many as the windows in memory may stand for, but their
        # table takes at most a fiftieth of the memory.
        least = max(2 * context_tokens, units * page_size)
        windows = units * page_size // config.lazy_tokens * context_tokens
        full_limit = min(max(least, min(windows, budget_bytes // (50 * POSITION_BYTES))), MAX_POSITIONS)
        full_limit = full_limit // page_size * page_size
        units -= -(-_position_bytes(full_limit, context_tokens) // (unit_bytes + tables))
    if config.dynamic:
        demand = demand.undecided_up_to(_undecided(config, demand, units))
    most = units * page_size if full_limit is None else full_limit
    longest = demand.longest(units, most)
    if longest < max(min(config.retained_tokens + chunk_tokens, context_tokens, most), 1):
        raise LightTransferError(
            f"KV memory: {budget_bytes / 2**20:.4g} MiB do not hold a prefill chunk of {chunk_tokens} tokens "
            "and a window; raise --mem-fraction-static or lower --chunked-prefill-size"
        )
    return Sizes(shape, units, unit_bytes, demand, full_limit, longest)


def _position_bytes(positions: int, context_tokens: int) -> int:
    """What they take beyond those of two requests, which count as nothing."""
    return max(positions - 2 * context_tokens, 0) * POSITION_BYTES


def _undecided(config: LightTransferConfig, demand: Demand, units: int) -> int:
    """Longest prefix that stays undecided between two prefill chunks, in tokens."""
    if config.decide == "first-chunk":
        return config.decide_tokens - 1
    # A prompt whose keys are all sink or recent tells no layers apart.
    least = config.lazy_tokens + config.last_queries
    return min(max(demand.undecided_limit(units), least), demand.context)
