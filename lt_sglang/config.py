"""What a server is asked to do: mode, lazy layers, windows.

The configuration travels as the key ``lighttransfer`` of the model's config.json (or of
``--json-model-override-args``), so every rank, and every process that reads the model config, sees
the same one. This module imports neither torch nor sglang.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.numerals import read_int
from lt_sglang.static_choices import CHOICES, MAX_LAYERS, check_amount, choose, parse_choice, spelling

MODES = ("static", "dynamic")
SCORES = ("lighttransfer", "residual-error", "discarded-mass", "error-mass", "squeeze")
LIST = "list"  # in place of a score: the layers that the configuration names
DECIDE = ("prompt", "first-chunk")
CONFIG_KEY = "lighttransfer"
DEFAULT_SINK_TOKENS = 4  # arXiv 2410.13846, appendix A
DEFAULT_RECENT_TOKENS = 1020
DEFAULT_KEEP = 0.5
DEFAULT_SCORE = "residual-error"
DEFAULT_DECIDE = "prompt"
DEFAULT_LAST_QUERIES = 32  # w_last, appendix A
LAST_QUERIES_FIRST_CHUNK = 128  # also the most that may be asked for
DYNAMIC_FIELDS = ("keep", "score", "decide", "last_queries", "check_tables")
MAX_TOKENS = 1 << 24
MAX_BYTES = 1 << 48


def parse_lazy_layers(text: str, label: str = "lazy_layers") -> tuple[tuple[int, ...], str | None]:
    """Layers as parse_layers, or none and the choice that ``text`` names, such as ``"ends:0.5"``.

    Args:
        text: as a user wrote it.
        label: what an error calls the field.

    Raises:
        LightTransferError: neither layers nor a choice.
    """
    choice = parse_choice(text.strip(), label)
    return (parse_layers(text, label), None) if choice is None else ((), text.strip())


def parse_layers(text: str, label: str = "lazy_layers") -> tuple[int, ...]:
    """Parse ``"5-24,26,30-33"`` into sorted unique layer indices; ``"none"`` and ``""`` give ``()``.

    Raises:
        LightTransferError: anything else, and on a layer named twice; it calls the field ``label``.
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
                f"{label}: {part.strip()!r} is neither a layer (7) nor a range (5-24); write them "
                f"separated by commas, or none, or one of {', '.join(map(spelling, CHOICES))}"
            )
        if low > high:
            raise LightTransferError(f"{label}: the range {part.strip()!r} runs backwards")
        if high >= MAX_LAYERS:
            raise LightTransferError(f"{label}: {high} is not a layer from 0 to {MAX_LAYERS - 1}")
        layers.extend(range(low, high + 1))
    if len(set(layers)) != len(layers):
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        raise LightTransferError(f"{label}: layer {twice[0]} is named twice")
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
    kv_bytes: most bytes of KV memory on one rank; None leaves it to --mem-fraction-static.
    source: where the configuration came from, for logs and /server_info.
    choice: in place of lazy_layers until ``settle`` knows the model: a pattern such as "ends:0.5".

    Dynamic mode only:
    keep: layers that keep full attention, a number from 1 or a share between 0 and 1. None means 0.5, or with
        the score "list" all that are not in lazy_layers.
    score: how a layer's laziness is measured, one of SCORES; "list" takes lazy_layers for every request.
    decide: "prompt": at the prompt's last token (the paper). "first-chunk": at the end of the first prefill
        chunk that reaches decide_tokens; later chunks already use streaming attention.
    last_queries: w_last, how many of a prompt's last queries the score looks at; a first chunk's 128.
    check_tables: compare the layer tables of all tensor-parallel ranks after every prefill (debugging).
    """

    lazy_layers: tuple[int, ...]
    mode: str = "static"
    sink_tokens: int = DEFAULT_SINK_TOKENS
    recent_tokens: int = DEFAULT_RECENT_TOKENS
    kv_bytes: int | None = None
    source: str = "flags"
    keep: int | float | None = None
    score: str = DEFAULT_SCORE
    decide: str = DEFAULT_DECIDE
    last_queries: int = DEFAULT_LAST_QUERIES
    check_tables: bool = False
    choice: str | None = None

    def __post_init__(self) -> None:
        for name in _OPTIONAL | _REQUIRED:
            if name in _REQUIRED or getattr(self, name) is not None:
                check_value(name, getattr(self, name))
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

    def settle(self, num_layers: int) -> LightTransferConfig:
        """The configuration for a model of ``num_layers``: ``keep`` a number, the lazy layers a list.

        Dynamic mode without a list for short prompts makes the ends of the stack lazy for them. Idempotent.

        Raises:
            LightTransferError: both do not fit the model, or each other.
        """
        if self.choice is not None:
            choice = parse_choice(self.choice)
            assert choice is not None
            lazy = choose(choice.name, num_layers, choice.lazy)
            source = f"{self.source}: {self.choice} (a pattern, not calibrated)"
            return replace(self, lazy_layers=lazy, choice=None, source=source).settle(num_layers)
        self.check_model(num_layers)
        if not self.dynamic:
            return self
        listed = self.score == LIST
        if listed and not self.lazy_layers:
            raise LightTransferError(
                f"lazy_layers: the score 'list' needs them, 1 to {num_layers - 1} of the layers 0 to "
                f"{num_layers - 1}, such as 5-24,26"
            )
        share = self.keep
        if share is None:
            share = num_layers - len(self.lazy_layers) if listed else DEFAULT_KEEP
        keep = share if isinstance(share, int) else round(share * num_layers)
        if not 1 <= keep < num_layers:
            raise LightTransferError(
                f"keep: {share} of {num_layers} layers is {keep}; dynamic mode needs 1 to "
                f"{num_layers - 1} (mode 'static' serves none or all of them lazy)"
            )
        lazy = self.lazy_layers or choose("ends", num_layers, num_layers - keep)
        if len(lazy) != num_layers - keep:
            which = "in the list" if listed else "for short prompts"
            raise LightTransferError(
                f"lazy_layers: {len(lazy)} layers {which}, but keep {share} of {num_layers} "
                f"leaves {num_layers - keep} lazy; both must agree"
            )
        return replace(self, keep=keep, lazy_layers=lazy)

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
            "lazy_layers": self.choice or format_layers(self.lazy_layers),
            "sink_tokens": self.sink_tokens,
            "recent_tokens": self.recent_tokens,
            "kv_bytes": self.kv_bytes,
            "source": self.source,
        }
        if self.dynamic:
            data.update({name: getattr(self, name) for name in DYNAMIC_FIELDS})
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str | None = None) -> LightTransferConfig:
        """Read the value of the key ``lighttransfer``.

        lazy_layers may be a string ("5-24,26", "ends:0.5") or a list of integers. Keys that start with ``_``
        are notes. Raises LightTransferError, which names ``source``, on any other key and a bad value.
        """
        try:
            return cls(**cls._values(data) | ({} if source is None else {"source": source}))
        except LightTransferError as error:
            raise LightTransferError(f"{source}: {error}" if source is not None else str(error)) from None

    @classmethod
    def _values(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(data, Mapping):
            raise LightTransferError(f"{CONFIG_KEY}: must be an object, not {type(data).__name__}")
        allowed = set(cls.__dataclass_fields__) - {"choice"}
        unknown = sorted(key for key in data if key not in allowed and not key.startswith("_"))
        if unknown:
            raise LightTransferError(
                f"{CONFIG_KEY}.{unknown[0]}: unknown key, allowed are {', '.join(sorted(allowed))}"
            )
        if "lazy_layers" not in data and data.get("mode", MODES[0]) != MODES[0]:
            data = {**data, "lazy_layers": ()}
        if "lazy_layers" not in data:
            raise LightTransferError(
                f"{CONFIG_KEY}.lazy_layers: missing; write '5-24,26', or mode 'dynamic', which needs none"
            )
        values = {key: value for key, value in data.items() if key in allowed}
        if values.get("mode", MODES[0]) == MODES[0]:
            for name in DYNAMIC_FIELDS:
                if values.get(name) not in (None, cls.__dataclass_fields__[name].default):
                    raise LightTransferError(f"{CONFIG_KEY}.{name}: only with mode 'dynamic'")
        layers = values["lazy_layers"]
        if isinstance(layers, str):
            values["lazy_layers"], values["choice"] = parse_lazy_layers(layers)
        elif isinstance(layers, (list, tuple)) and all(type(layer) is int for layer in layers):
            if len(set(layers)) != len(layers):
                raise LightTransferError("lazy_layers: a layer is named twice")
            values["lazy_layers"] = tuple(sorted(layers))
        else:
            raise LightTransferError("lazy_layers: must be a string such as '5-24,26' or a list of integers")
        return values

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


_ALLOWED = {"mode": MODES, "score": (*SCORES, LIST), "decide": DECIDE}
_RANGES = {
    "sink_tokens": (0, MAX_TOKENS),
    "recent_tokens": (1, MAX_TOKENS),
    "kv_bytes": (1, MAX_BYTES),
    "last_queries": (1, LAST_QUERIES_FIRST_CHUNK),
}
_REQUIRED = {*_ALLOWED, "sink_tokens", "recent_tokens", "last_queries", "check_tables"}
_OPTIONAL = {"keep", "kv_bytes"}


def check_value(name: str, value: object, label: str | None = None) -> None:
    """Raise LightTransferError unless the field ``name`` may be ``value``; it calls the field ``label``."""
    label = label or name
    if name in _ALLOWED and value not in _ALLOWED[name]:
        if name == "score" and value in CHOICES:
            raise LightTransferError(
                f"{label}: {value!r} looks at no prompt; in place of it, give the lazy layers as "
                f"{spelling(str(value))!r}"
            )
        raise LightTransferError(f"{label}: {value!r} is not one of {', '.join(_ALLOWED[name])}")
    number = value if isinstance(value, int) and not isinstance(value, bool) else -1
    low, high = _RANGES.get(name, (number, number))
    if not low <= number <= high:
        raise LightTransferError(f"{label}: {value!r} is not an integer from {low} to {high}")
    if name == "check_tables" and type(value) is not bool:
        raise LightTransferError(f"{label}: {value!r} is not true or false")
    if name == "keep":
        check_amount(label, value)
