"""The ``--lt-*`` options, shared by serve, plan and doctor, and how they become a configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lt_sglang.config import (
    ALL_SCORES,
    CONFIG_KEY,
    DECIDE,
    DEFAULT_KEEP,
    DEFAULT_SCORE,
    DYNAMIC_FIELDS,
    MODES,
    SCORES,
    LightTransferConfig,
    format_layers,
    parse_layers,
    read_float,
    read_int,
)
from lt_sglang.errors import LightTransferError
from lt_sglang.models import find_config
from lt_sglang.static_choices import CHOICES, LIST

HALF = "half"

OPTIONS_HELP = f"""\
lazy layers:
  --lt-lazy-layers LIST     layers that keep sink + recent tokens only: 5-24,26 or none, or half (every second
                            layer: for demonstrations, it costs quality)
  --lt-config FILE.json     read the configuration from a file
  --lt-mode static|dynamic  the same layers for every request (default), or found in each request's prefill
  --lt-sink-tokens N        first tokens a lazy layer keeps (default 4)
  --lt-recent-tokens N      most recent tokens it keeps, the query's own included (default 1020)
  --lt-expected-tokens N    prompt + output tokens of a typical request; splits the KV memory (default: the
                            context length, at most 8192)
  --lt-expected-output-tokens N   how many of them are output
dynamic mode only:
  --lt-keep 0.5             layers that keep full attention, a share or a number (default 0.5; with --lt-score
                            list, what it leaves)
  --lt-score NAME           (default {DEFAULT_SCORE})
                            {", ".join(SCORES)};
                            or a static list that does not look at the prompt: {", ".join(CHOICES)};
                            or {LIST}: the layers given, after a prefill with full attention in all
  --lt-decide prompt|first-chunk   at the prompt's last token (default), or at the end of the first prefill
                            chunk; later chunks are then cheaper
  --lt-staging-tokens N     longest undecided prefix between chunks (default: the expected tokens)
  --lt-check-tables on|off  compare all ranks' decisions after every prefill (debugging)
  Each of them replaces one value. What is not given comes from --lt-config, else from the key 'lighttransfer'
  of --json-model-override-args, else of the model's config.json, else from the known models
  (lt-sglang models)."""


@dataclass(frozen=True)
class LtOptions:
    """What the ``--lt-*`` options said, None if not given; values are checked, layers not yet resolved."""

    lazy_layers: str | None = None
    config: str | None = None
    mode: str | None = None
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    expected_tokens: int | None = None
    expected_output_tokens: int | None = None
    keep: int | float | None = None
    score: str | None = None
    decide: str | None = None
    staging_tokens: int | None = None
    check_tables: bool | None = None

    def given(self) -> list[str]:
        """The flags given, in the order above."""
        return [f"--lt-{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]

    def as_flags(self) -> list[str]:
        """What ``take_options`` would read these options from."""
        words = {True: "on", False: "off"}
        values = [value for value in vars(self).values() if value is not None]
        return [
            f"{flag}={words[value] if isinstance(value, bool) else value}"
            for flag, value in zip(self.given(), values, strict=True)
        ]


def take_options(argv: list[str]) -> tuple[LtOptions, list[str]]:
    """Split our options from the others, which keep their order.

    Accepts ``--flag value`` and ``--flag=value``. Raises LightTransferError on an unknown ``--lt-`` flag, a
    missing or bad value and an option given twice.
    """
    values: dict[str, Any] = {}
    rest: list[str] = []
    todo = iter(argv)
    for arg in todo:
        if not arg.startswith("--lt-"):
            rest.append(arg)
            continue
        flag, equals, value = arg.partition("=")
        name = flag.removeprefix("--lt-").replace("-", "_")
        if name not in LtOptions.__dataclass_fields__ or "_" in flag:
            allowed = ", ".join(f"--lt-{field.replace('_', '-')}" for field in LtOptions.__dataclass_fields__)
            raise LightTransferError(f"{flag}: unknown option, allowed are {allowed}")
        if not equals:
            value = next(todo, "")
        if not value or (not equals and value.startswith("--")):
            raise LightTransferError(f"{flag}: a value is missing")
        if name in values:
            raise LightTransferError(f"{flag}: given twice")
        values[name] = _typed(flag, name, value)
    return LtOptions(**values), rest


def resolve_config(
    options: LtOptions,
    model_path: str,
    model_config: Mapping[str, Any] | None,
    overrides: Mapping[str, Any],
) -> LightTransferConfig | None:
    """The configuration that the options, the model and the known models add up to.

    Args:
        model_config: the model's config.json, or None if it cannot be read here.
        overrides: the object of ``--json-model-override-args``.

    Returns:
        None only if nothing was given and config.json cannot be read: SGLang's process then decides.

    Raises:
        LightTransferError: no lazy layers from anywhere, layers the model does not have, a bad value.
    """
    base = _base(options, model_path, model_config, overrides)
    changes: dict[str, Any] = {
        name: value
        for name in LtOptions.__dataclass_fields__
        if name not in ("lazy_layers", "config")
        if (value := getattr(options, name)) is not None
    }
    num_layers = layer_count(model_config) if model_config is not None else None
    if options.lazy_layers == HALF:
        if num_layers is None:
            raise LightTransferError(
                f"--lt-lazy-layers half: how many layers {model_path} has is not known here; name them"
            )
        changes["lazy_layers"] = tuple(range(1, num_layers, 2))
    elif options.lazy_layers is not None:
        changes["lazy_layers"] = parse_layers(options.lazy_layers)
    dynamic = changes.get("mode", base.mode if base is not None else "static") == "dynamic"
    listed = changes.get("score", base.score if base is not None else None) == LIST
    for name in DYNAMIC_FIELDS:
        if name in changes and not dynamic:
            raise LightTransferError(f"--lt-{name.replace('_', '-')}: only with --lt-mode dynamic")
    if dynamic and not listed and "lazy_layers" not in changes and not (base is not None and base.dynamic):
        changes["lazy_layers"] = ()  # a static list says nothing of short prompts
    if base is None and "lazy_layers" not in changes:
        if model_config is None and not changes:
            return None
        raise LightTransferError(
            f"lazy_layers: none given for {model_path} and none known; use --lt-lazy-layers 5-24,26 (none: "
            f"every layer full), --lt-config FILE.json, or the key '{CONFIG_KEY}' in the model's config.json"
        )
    if changes:
        flags = ", ".join(flag for flag in options.given() if flag != "--lt-config")
        changes["source"] = f"{base.source}, with {flags}" if base is not None else flags
    config = replace(base, **changes) if base is not None else LightTransferConfig(**changes)
    return config if num_layers is None else config.settle(num_layers)


def layer_count(model_config: Mapping[str, Any]) -> int | None:
    """The number of decoder layers a config.json names, or None."""
    text = model_config.get("text_config")
    count = (text if isinstance(text, Mapping) else model_config).get("num_hidden_layers")
    return count if isinstance(count, int) else None


def describe(config: LightTransferConfig) -> str:
    """One line for people."""
    expected = f", {config.expected_tokens} tokens expected" if config.expected_tokens else ""
    if config.dynamic and config.score == LIST:
        return (
            f"dynamic: {len(config.lazy_layers)} lazy layers ({short_layers(config.lazy_layers)}), cut at "
            f"each request's {config.decide.replace('-', ' ')}; {config.sink_tokens} sink + "
            f"{config.recent_tokens} recent tokens{expected}; from {config.source}"
        )
    if config.dynamic:
        keep = DEFAULT_KEEP if config.keep is None else config.keep
        return (
            f"dynamic: each request keeps {keep} layers full, found by {config.score} at its "
            f"{config.decide.replace('-', ' ')}; {config.sink_tokens} sink + {config.recent_tokens} recent "
            f"tokens{expected}; from {config.source}"
        )
    return (
        f"{len(config.lazy_layers)} lazy layers ({short_layers(config.lazy_layers)}), "
        f"{config.sink_tokens} sink + {config.recent_tokens} recent tokens{expected}; from {config.source}"
    )


def short_layers(layers: Iterable[int], width: int = 48) -> str:
    """As format_layers, with the middle of a long list left out."""
    text = format_layers(layers)
    if len(text) <= width:
        return text
    parts = text.split(",")
    return f"{','.join(parts[:3])},...,{parts[-1]}"


def _base(
    options: LtOptions, model_path: str, model_config: Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> LightTransferConfig | None:
    if options.config is not None:
        if CONFIG_KEY in overrides:
            raise LightTransferError(
                f"--lt-config: --json-model-override-args has the key '{CONFIG_KEY}' too; give one of them"
            )
        try:
            text = Path(options.config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LightTransferError(f"--lt-config {options.config}: cannot be read ({error})") from None
        return LightTransferConfig.from_json(text, source=options.config)
    return find_config(overrides, model_config, model_path, "--json-model-override-args")


def _keep(flag: str, value: str) -> int | float:
    number, share = read_int(value), read_float(value)
    if number is not None and number >= 1:
        return number
    if share is None or not 0 < share < 1:
        raise LightTransferError(f"{flag}: {value!r} is neither a number of layers nor a share such as 0.5")
    return share


def _typed(flag: str, name: str, value: str) -> str | int | float:
    if name.endswith("_tokens"):
        low = 0 if name in ("sink_tokens", "expected_output_tokens") else 1
        number = read_int(value)
        if number is None or number < low:
            raise LightTransferError(f"{flag}: {value!r} is not an integer from {low}")
        return number
    allowed = {"mode": MODES, "score": ALL_SCORES, "decide": DECIDE, "check_tables": ("on", "off")}
    if name in allowed and value not in allowed[name]:
        raise LightTransferError(f"{flag}: {value!r} is not one of {', '.join(allowed[name])}")
    if name == "check_tables":
        return value == "on"
    if name == "keep":
        return _keep(flag, value)
    if name == "lazy_layers" and value != HALF:
        parse_layers(value)
    if name == "config" and not Path(value).is_file():
        # Now, since a model's name may be looked up for half a minute before it is read.
        raise LightTransferError(f"--lt-config {value}: cannot be read (no such file)")
    return value
