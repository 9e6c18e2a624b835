"""What a server is asked to do: mode, lazy layers, windows.

The configuration travels as the key ``lighttransfer`` of the model's config.json (or of
``--json-model-override-args``), so every rank, and every process that reads the model config, sees
the same one. This module imports neither torch nor sglang.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.static_choices import CHOICES, LIST, choose

MODES = ("static", "dynamic")
SCORES = ("lighttransfer", "residual-error", "discarded-mass", "error-mass", "squeeze")
ALL_SCORES = (*SCORES, *CHOICES, LIST)
DECIDE = ("prompt", "first-chunk")
CONFIG_KEY = "lighttransfer"
DEFAULT_SINK_TOKENS = 4  # arXiv 2410.13846, appendix A
DEFAULT_RECENT_TOKENS = 1020
DEFAULT_EXPECTED_TOKENS = 8192
DEFAULT_KEEP = 0.5
DEFAULT_SCORE = "residual-error"
DEFAULT_DECIDE = "prompt"
LAST_QUERIES = 32  # w_last, appendix A
LAST_QUERIES_FIRST_CHUNK = 128
DYNAMIC_FIELDS = ("keep", "score", "decide", "staging_tokens", "check_tables")
MAX_TOKENS = 1 << 24
MAX_LAYERS = 1024  # a mistyped range must not fill the memory


MAX_DIGITS = 18  # more is no number of anything here


def read_int(text: str) -> int | None:
    """The number that ``text`` writes in ASCII digits and nothing else; None if it writes none.

    ``int`` also reads other scripts' digits, signs, spaces and underscores.
    """
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS else None


def read_float(text: str) -> float | None:
    """The finite number that ``text`` writes in ASCII, such as 0.5 or 1e3; None if it writes none."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse ``"5-24,26,30-33"`` into sorted unique layer indices; ``"none"`` and ``""`` give ``()``.

    Raises LightTransferError on anything else, and on a layer named twice.
    """
    text = text.strip()
    if text in ("", "none"):
        return ()
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        low = read_int(first)
        high = read_int(last) if dash else low
        if low is None or high is None:
            raise LightTransferError(
                f"lazy_layers: {part.strip()!r} is neither a layer (7) nor a range (5-24); "
                "write comma-separated layers and ranges, or none"
            )
        if low > high:
            raise LightTransferError(f"lazy_layers: the range {part.strip()!r} runs backwards")
        if high >= MAX_LAYERS:
            raise LightTransferError(f"lazy_layers: {high} is not a layer from 0 to {MAX_LAYERS - 1}")
        layers.extend(range(low, high + 1))
    if len(set(layers)) != len(layers):
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        raise LightTransferError(f"lazy_layers: layer {twice[0]} is named twice")
    return tuple(sorted(layers))


def format_layers(layers: Iterable[int]) -> str:
    """The inverse of parse_layers: ``(5, 6, 7, 9)`` becomes ``"5-7,9"``, ``()`` becomes ``"none"``."""
    ordered = sorted(layers)
    runs: list[list[int]] = []
    for layer in ordered:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs) or "none"


@dataclass(frozen=True)
class LightTransferConfig:
    """A validated request for lazy layers.

    lazy_layers: sorted layer indices (0-based) that keep only sink + recent tokens; in dynamic mode those of
        requests whose prompt is too short to tell, and of all with the score "list".
    mode: "static": the same layers for every request. "dynamic": found for each request in its prefill.
    sink_tokens: w_sink >= 0, the first tokens of a request every query of a lazy layer sees.
    recent_tokens: w_recent >= 1, the most recent tokens it sees, its own included.
    expected_tokens: prompt + output tokens of a typical request; splits the KV memory between the
        full and the streaming pool. None means min(context length, 8192).
    expected_output_tokens: how many of them are output; None means not known.
    source: where the configuration came from, for logs and /server_info.

    Dynamic mode only:
    keep: layers that keep full attention, a number from 1 or a share between 0 and 1. None means 0.5, or with
        the score "list" all that are not in lazy_layers.
    score: how a layer's laziness is measured, one of SCORES; one of CHOICES makes a static list of ``keep``;
        "list" takes lazy_layers for every request.
    decide: "prompt": at the prompt's last token (the paper). "first-chunk": at the end of the first prefill
        chunk that is longer than sink + recent; later chunks already use streaming attention.
    staging_tokens: longest prompt prefix that may wait undecided between chunks (decide: "prompt"); a longer
        prompt is decided when its chunk would pass it. None means expected_tokens.
    check_tables: compare the layer tables of all tensor-parallel ranks after every prefill (debugging).
    """

    lazy_layers: tuple[int, ...]
    mode: str = "static"
    sink_tokens: int = DEFAULT_SINK_TOKENS
    recent_tokens: int = DEFAULT_RECENT_TOKENS
    expected_tokens: int | None = None
    expected_output_tokens: int | None = None
    source: str = "flags"
    keep: int | float | None = None
    score: str = DEFAULT_SCORE
    decide: str = DEFAULT_DECIDE
    staging_tokens: int | None = None
    check_tables: bool = False

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, MODES)
        _check_choice("score", self.score, ALL_SCORES)
        _check_choice("decide", self.decide, DECIDE)
        if self.keep is not None:
            _check_keep(self.keep)
        if self.staging_tokens is not None:
            _check_int("staging_tokens", self.staging_tokens, 1)
        if type(self.check_tables) is not bool:
            raise LightTransferError(f"check_tables: {self.check_tables!r} is not true or false")
        _check_int("sink_tokens", self.sink_tokens, 0)
        _check_int("recent_tokens", self.recent_tokens, 1)
        if self.expected_tokens is not None:
            _check_int("expected_tokens", self.expected_tokens, 1)
        if self.expected_output_tokens is not None:
            _check_int("expected_output_tokens", self.expected_output_tokens, 0)
            if self.expected_tokens is not None and self.expected_output_tokens > self.expected_tokens:
                raise LightTransferError(
                    f"expected_output_tokens: {self.expected_output_tokens} is more than expected_tokens "
                    f"({self.expected_tokens}), which counts prompt and output"
                )
        if any(type(layer) is not int or layer < 0 for layer in self.lazy_layers):
            raise LightTransferError("lazy_layers: layers are integers from 0")
        if list(self.lazy_layers) != sorted(set(self.lazy_layers)):
            raise LightTransferError("lazy_layers: layers must be sorted and unique")

    @property
    def retained_tokens(self) -> int:
        """Streaming KV slots a long request holds besides its sink rows.

        At least w_sink, so that nothing is freed before every sink position has been computed.
        """
        return max(self.recent_tokens, self.sink_tokens, 2)

    @property
    def lazy_tokens(self) -> int:
        """Keys a query of a lazy layer sees at most: w_sink + w_recent."""
        return self.sink_tokens + self.recent_tokens

    @property
    def dynamic(self) -> bool:
        """Whether each request's lazy layers are found in its prefill."""
        return self.mode == "dynamic"

    @property
    def decide_tokens(self) -> int:
        """Tokens a first chunk must end at or behind to be decided on (``decide``: "first-chunk")."""
        return self.lazy_tokens + LAST_QUERIES_FIRST_CHUNK

    def stage_limit(self, context_tokens: int) -> int:
        """Longest prefix that stays undecided between two prefill chunks, in tokens."""
        if self.decide == "first-chunk":
            return self.decide_tokens - 1
        staging = self.staging_tokens or self.expected_tokens or DEFAULT_EXPECTED_TOKENS
        # A prompt whose keys are all sink or recent tells no layers apart.
        return min(max(staging, self.lazy_tokens + LAST_QUERIES), context_tokens)

    def undecided_rows(self, context_tokens: int, batch_tokens: int) -> int:
        """Rows, of one layer's K and V, set aside for prompts that are not decided yet; 0 in static mode.

        The staged prefix in every layer that may become lazy, and one layer's ``batch_tokens`` new ones.
        """
        if not self.dynamic:
            return 0
        return len(self.lazy_layers) * self.stage_limit(context_tokens) + batch_tokens

    def settle(self, num_layers: int) -> LightTransferConfig:
        """The configuration for a model of ``num_layers``: ``keep`` a number, the lazy layers a list.

        Static mode: checks the list. Dynamic mode: a choice that does not look at the prompt becomes a static
        list, but for "list", which needs one; without a list for short prompts, the ends of the stack are
        lazy ("ends"). Idempotent. Raises LightTransferError.
        """
        if not self.dynamic:
            self.check_model(num_layers)
            return self
        listed = self.score == LIST
        if listed:
            self.check_model(num_layers)
            if not self.lazy_layers:
                raise LightTransferError(
                    f"lazy_layers: the score 'list' needs them, 1 to {num_layers - 1} of the layers 0 to "
                    f"{num_layers - 1} (--lt-lazy-layers 5-24,26)"
                )
        share = self.keep
        if self.score == "all" and share is not None:
            raise LightTransferError(f"keep: {share}, but the score 'all' keeps no layer full")
        if self.score in CHOICES and self.lazy_layers:
            raise LightTransferError(
                f"lazy_layers: the score {self.score!r} chooses them; to give them, use mode 'static' or the "
                "score 'list'"
            )
        if share is None:
            share = num_layers - len(self.lazy_layers) if listed else DEFAULT_KEEP
        keep = share if isinstance(share, int) else round(share * num_layers)
        if self.score == "all":
            keep = 0
        elif not 1 <= keep < num_layers:
            raise LightTransferError(
                f"keep: {share} of {num_layers} layers is {keep}; dynamic mode needs 1 to "
                f"{num_layers - 1} (--lt-mode static serves none or all of them lazy)"
            )
        if self.score in CHOICES:
            lazy = choose(self.score, num_layers, keep, seed=0)
            source = f"{self.source}, {self.score} keeping {keep}"
            return replace(
                self, mode="static", lazy_layers=lazy, source=source, score=DEFAULT_SCORE, keep=None
            )
        lazy = self.lazy_layers or choose("ends", num_layers, keep, seed=0)
        if len(lazy) != num_layers - keep:
            which = "in the list" if listed else "for short prompts"
            raise LightTransferError(
                f"lazy_layers: {len(lazy)} layers {which}, but keep {share} of {num_layers} "
                f"leaves {num_layers - keep} lazy; both must agree"
            )
        settled = replace(self, keep=keep, lazy_layers=lazy)
        settled.check_model(num_layers)
        return settled

    def check_model(self, num_layers: int) -> None:
        """Raise LightTransferError if a lazy layer does not exist in a model of ``num_layers``."""
        if self.lazy_layers and self.lazy_layers[-1] >= num_layers:
            raise LightTransferError(
                f"lazy_layers: layer {self.lazy_layers[-1]} does not exist, "
                f"the model has layers 0 to {num_layers - 1}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The value of the key ``lighttransfer``; from_dict reads it back."""
        data: dict[str, Any] = {
            "mode": self.mode,
            "lazy_layers": format_layers(self.lazy_layers),
            "sink_tokens": self.sink_tokens,
            "recent_tokens": self.recent_tokens,
            "expected_tokens": self.expected_tokens,
            "expected_output_tokens": self.expected_output_tokens,
            "source": self.source,
        }
        if self.dynamic:
            data.update({name: getattr(self, name) for name in DYNAMIC_FIELDS})
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str | None = None) -> LightTransferConfig:
        """Read the value of the key ``lighttransfer``.

        lazy_layers may be a string ("5-24,26") or a list of integers. Raises LightTransferError on
        unknown keys, a missing lazy_layers and every bad value. Keys that start with ``_`` are notes.
        """
        if not isinstance(data, Mapping):
            raise LightTransferError(f"{CONFIG_KEY}: must be an object, not {type(data).__name__}")
        allowed = set(cls.__dataclass_fields__)
        unknown = sorted(key for key in data if key not in allowed and not key.startswith("_"))
        if unknown:
            raise LightTransferError(
                f"{CONFIG_KEY}.{unknown[0]}: unknown key, allowed are {', '.join(sorted(allowed))}"
            )
        if "lazy_layers" not in data and data.get("mode", MODES[0]) != MODES[0]:
            data = {**data, "lazy_layers": ()}
        if "lazy_layers" not in data:
            raise LightTransferError(f"{CONFIG_KEY}.lazy_layers: missing; write e.g. '5-24,26' or 'none'")
        values = {key: value for key, value in data.items() if key in allowed}
        if values.get("mode", MODES[0]) == MODES[0]:
            for name in DYNAMIC_FIELDS:
                if values.get(name) not in (None, cls.__dataclass_fields__[name].default):
                    raise LightTransferError(f"{CONFIG_KEY}.{name}: only with mode 'dynamic'")
        layers = values["lazy_layers"]
        if isinstance(layers, str):
            values["lazy_layers"] = parse_layers(layers)
        elif isinstance(layers, (list, tuple)) and all(type(layer) is int for layer in layers):
            if len(set(layers)) != len(layers):
                raise LightTransferError("lazy_layers: a layer is named twice")
            values["lazy_layers"] = tuple(sorted(layers))
        else:
            raise LightTransferError("lazy_layers: must be a string such as '5-24,26' or a list of integers")
        if source is not None:
            values["source"] = source
        return cls(**values)

    @classmethod
    def from_json(cls, text: str, source: str) -> LightTransferConfig:
        """Read a config file: the object itself, or any object that has it under ``lighttransfer``."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise LightTransferError(f"{source}: not valid JSON ({error})") from None
        if isinstance(data, Mapping) and CONFIG_KEY in data:
            data = data[CONFIG_KEY]
        return cls.from_dict(data, source=source)


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LightTransferError(f"{name}: {value!r} is not one of {', '.join(allowed)}")


def _check_keep(keep: object) -> None:
    number = type(keep) is int and 1 <= keep <= MAX_LAYERS
    share = type(keep) is float and 0 < keep < 1
    if not number and not share:
        raise LightTransferError(
            f"keep: {keep!r} is neither a number of layers from 1 nor a share such as 0.5"
        )


def _check_int(name: str, value: object, low: int) -> None:
    if type(value) is not int or not low <= value <= MAX_TOKENS:
        raise LightTransferError(f"{name}: {value!r} is not an integer from {low} to {MAX_TOKENS}")
