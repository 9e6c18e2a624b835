"""How much of the KV memory requests will take. Pure arithmetic; what admission goes by.

In full layers a request holds all its tokens. In lazy ones it holds, while it is prefilled, its window and
the chunk (an undecided prompt of dynamic mode: all of it); while it decodes, the window of its prompt and
beside it that of its output; once ``window`` tokens are decoded the prompt's is let go, the output's slides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lt_sglang.memory.units import UnitShape

# What a client that names no limit is reckoned with, as in SGLang (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION).
UNNAMED_OUTPUT = 4096


@dataclass(frozen=True)
class Demand:
    """What one rank's requests take, in units.

    shape, page_size: of the units. window: tokens that a window keeps. interval: tokens by which a window
    slides at a time. chunk: most tokens of a prefill batch. context: most tokens of a request.
    undecided: most tokens of a prompt that keep all their slots between two chunks (dynamic mode), else 0.
    sink_tokens: w_sink.
    """

    shape: UnitShape
    page_size: int
    window: int
    interval: int
    chunk: int
    context: int
    undecided: int = 0
    sink_tokens: int = 0

    def undecided_up_to(self, tokens: int) -> Demand:
        """The same in dynamic mode."""
        return replace(self, undecided=tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; from_dict reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Demand:
        """The inverse of to_dict."""
        return cls(**{**data, "shape": UnitShape(**data["shape"])})

    @property
    def both(self) -> int:
        """Units of a page of tokens in all layers."""
        return self.shape.full_units + self.shape.streaming_units

    @property
    def streaming_longest(self) -> int:
        """Streaming slots that one request, alone on a server, can hold at most, its chunk included.

        The tree keeps the last window of its cached prefix or its prompt, and locks whole nodes: one of them
        may begin before the window, and is at most as long (SGLang cuts them so). Beside it the request holds
        a window of new tokens, which slides in steps of the interval.
        """
        node = max(self.window, self.interval)
        return self.chunk + self.window + node + self.window + self.interval

    def pages(self, tokens: int) -> int:
        """Pages of ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def units(self, full: int, streaming: int) -> int:
        """Units of so many slots of each kind."""
        return self.shape.units(self.pages(full), self.pages(streaming))

    def of_new(self, extend: int, output: int) -> int:
        """Most units that a request will hold of its own: ``extend`` tokens to prefill, then ``output``."""
        # Before it is decided, and at the end of its prefill.
        early = min(extend, self.undecided + self.chunk) if self.undecided else 0
        prefill = max(self.units(early, early), self.units(extend, min(extend, self.chunk + self.window)))
        return max(prefill + self.both + self._sinks, self.of_decoding(extend, output))

    def of_decoding(self, extend: int, output: int) -> int:
        """As ``of_new``, from the end of its prefill on."""
        window, late = self.window, self.window + self.interval
        begun = min(output, late)
        decode = self.units(extend + begun, min(extend, window) + begun)
        end = self.units(extend + output, late) if output > late else 0
        return max(decode, end) + self.both + self._sinks

    def of_running(self, own: int, output: int, returned: int = 0, *, new_sinks: bool = False) -> int:
        """Most units that a decoding request will take beyond what it holds.

        own: streaming tokens that it holds outside the prefix tree. output: tokens to come. returned: of its
        prompt's window, what the tree will let go on its account. new_sinks: its first tokens are about to
        leave the window, and need a sink set.
        """
        growth = max(0, min(output, self.window + self.interval - own))
        # By its end its prompt's window has been let go.
        end = self.units(output, growth) - self.shape.streaming_units * (returned // self.page_size)
        return max(self.units(growth, growth), end) + self.both + (self._sinks if new_sinks else 0)

    def longest(self, units: int, full_slots: int) -> int:
        """Tokens of the longest request that ``units`` and ``full_slots`` hold, if it has them for itself."""
        units -= self.both + self._sinks
        streaming = self.pages(self.streaming_longest)
        pages = units // self.both
        if pages > streaming:
            left = units - streaming * self.shape.streaming_units
            pages = left // self.shape.full_units if self.shape.full_units else self.pages(self.context)
        if self.undecided and self.both * self.pages(self.undecided + self.chunk) > units:
            pages = min(pages, units // self.both)
        return max(0, min(pages * self.page_size, full_slots))

    def undecided_limit(self, units: int) -> int:
        """Most tokens of a prompt that can stay undecided before a chunk of it, with ``units`` for itself."""
        return (units // self.both - 2) * self.page_size - self.chunk - self.sink_tokens

    @property
    def _sinks(self) -> int:
        return self.units(0, self.sink_tokens)


def expected_output(remaining: int, ratio: float, *, named: bool, unnamed: int = UNNAMED_OUTPUT) -> int:
    """Tokens that a request is reckoned to output yet.

    remaining: up to its limit. ratio: SGLang's new-token ratio, the share of their limits that requests have
    used. named: whether the client named that limit; if not it is the rest of the context, which few reach.
    """
    return int(max(remaining if named else min(remaining, unnamed), 0) * ratio)
