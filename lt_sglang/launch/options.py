"""The ``--lt-*`` options, shared by serve, plan and doctor, and how they become a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lt_sglang.config import (
    CONFIG_KEY,
    DEFAULT_KEEP,
    DEFAULT_SCORE,
    DYNAMIC_FIELDS,
    LIST,
    LightTransferConfig,
    check_value,
    format_layers,
    parse_lazy_layers,
)
from lt_sglang.errors import LightTransferError
from lt_sglang.models import find_config
from lt_sglang.numerals import read_amount, read_int

OPTIONS_HELP = f"""\
which layers?
  Nothing is known of your model: --lt-mode dynamic. It finds them in each request's prompt and needs no data.
  Its publisher trained it with lazy layers (lt-sglang models), or you did (lt-sglang train): no flag.
  You have samples of your traffic: lt-sglang calibrate writes a list; serve it with --lt-config FILE.json
  --lt-mode dynamic --lt-score list. For chat and shared documents that is best: docs/quality.md.
  The layers decide what is lost; lt-sglang eval measures it. A list made for another model tells nothing.

lazy layers:
  --lt-mode static|dynamic  the same layers for every request (default), or found in each request's prefill
  --lt-lazy-layers LAYERS   layers that keep sink + recent tokens only: 5-24,26 or none; or a pattern, for
                            comparisons: half (every second one), all, or ends:0.5, random:0.5, pyramid:0.5
                            (the share, or the number, of layers that are lazy)
  --lt-config FILE.json     read the configuration from a file, whose keys are spelled as these flags
  --lt-sink-tokens N        first tokens a lazy layer keeps (default 4)
  --lt-recent-tokens N      most recent tokens it keeps, the query's own included (default 1020)
  --lt-kv-bytes N           most bytes of KV memory on one GPU (default: what --mem-fraction-static leaves)
dynamic mode only:
  --lt-keep 0.5             layers that keep full attention, a share or a number (default 0.5; with --lt-score
                            list, what it leaves)
  --lt-score NAME           how lazy a layer is: {DEFAULT_SCORE} (default; what streaming would change in
                            the residual stream), lighttransfer (the paper's, the mean attention mass),
                            discarded-mass, error-mass (the product of the first and the third) or squeeze;
                            or {LIST}: the layers of --lt-lazy-layers or --lt-config, after a prefill with
                            full attention in all layers
  --lt-decide prompt|first-chunk   at the prompt's last token, as in the paper (default), or at the end of the
                            first prefill chunk that reaches sink + recent + 128 tokens, after which a prefill
                            is cheaper
  --lt-last-queries N       how many of a prompt's last queries the score looks at, 1 to 128 (default 32);
                            where a first chunk decides, always its last 128
  --lt-check-tables on|off  compare all ranks' decisions after every prefill (debugging; default off)
  Each of them replaces one value. What is not given comes from --lt-config, else from the key 'lighttransfer'
  of --json-model-override-args, else of the model's config.json, else from the known models
  (lt-sglang models)."""


def flag_of(name: str) -> str:
    """The flag of a field of LtOptions."""
    return f"--lt-{name.replace('_', '-')}"


@dataclass(frozen=True)
class LtOptions:
    """What the ``--lt-*`` options said, None if not given; values are checked, layers not yet resolved."""

    lazy_layers: str | None = None
    config: str | None = None
    mode: str | None = None
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    kv_bytes: int | None = None
    keep: int | float | None = None
    score: str | None = None
    decide: str | None = None
    last_queries: int | None = None
    check_tables: bool | None = None

    def given(self) -> list[str]:
        """The flags given, in the order above."""
        return [flag_of(name) for name, value in vars(self).items() if value is not None]

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
            allowed = ", ".join(map(flag_of, LtOptions.__dataclass_fields__))
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
        options: as given on the command line.
        model_path: a folder or a hub name.
        model_config: the model's config.json, or None if it cannot be read here.
        overrides: the object of ``--json-model-override-args``.

    Returns:
        None only if nothing was given and config.json cannot be read: SGLang's process then decides.

    Raises:
        LightTransferError: no lazy layers from anywhere, layers the model does not have, a bad value. It
            names the flag that gave the value, or where else it is from.
    """
    base = _base(options, model_path, model_config, overrides)
    changes: dict[str, Any] = {
        name: value for name, value in vars(options).items() if name != "config" and value is not None
    }
    if options.lazy_layers is not None:
        changes["lazy_layers"], changes["choice"] = parse_lazy_layers(options.lazy_layers)
    dynamic = changes.get("mode", base.mode if base is not None else "static") == "dynamic"
    listed = changes.get("score", base.score if base is not None else None) == LIST
    for name in DYNAMIC_FIELDS:
        if name in changes and not dynamic:
            raise LightTransferError(f"{flag_of(name)}: only with --lt-mode dynamic")
    if dynamic and not listed and "lazy_layers" not in changes and not (base is not None and base.dynamic):
        changes |= {"lazy_layers": (), "choice": None}  # a static list says nothing of short prompts
    if base is None and "lazy_layers" not in changes:
        if model_config is None and not changes:
            return None
        raise LightTransferError(
            f"lazy layers: none are known for {model_path}. With --lt-mode dynamic they are found in each "
            "request's prompt; lt-sglang calibrate writes a list by samples of your traffic (--lt-config "
            "FILE.json); --lt-lazy-layers 5-24,26 gives one (none: every layer full)"
        )
    if changes:
        flags = ", ".join(flag for flag in options.given() if flag != "--lt-config")
        changes["source"] = f"{base.source}, with {flags}" if base is not None else flags
    num_layers = layer_count(model_config) if model_config is not None else None
    try:
        config = replace(base, **changes) if base is not None else LightTransferConfig(**changes)
        return config if num_layers is None else config.settle(num_layers)
    except LightTransferError as error:
        raise LightTransferError(_as_typed(str(error), options, base)) from None


def _as_typed(message: str, options: LtOptions, base: LightTransferConfig | None) -> str:
    """``message`` with flags in place of the fields they gave; a field that none gave, with its source."""
    given = [name for name, value in vars(options).items() if value is not None]
    field, colon, text = message.partition(": ")
    for name in given:
        if "_" in name:
            text = re.sub(rf"\b{name}\b", flag_of(name), text)
    if field in given:
        return f"{flag_of(field)}{colon}{text}"
    return f"{base.source}: {field}{colon}{text}" if base is not None else f"{field}{colon}{text}"


def layer_count(model_config: Mapping[str, Any]) -> int | None:
    """The number of decoder layers a config.json names, or None."""
    text = model_config.get("text_config")
    count = (text if isinstance(text, Mapping) else model_config).get("num_hidden_layers")
    return count if isinstance(count, int) else None


def describe(config: LightTransferConfig) -> str:
    """One line for people."""
    if config.dynamic and config.score == LIST:
        return (
            f"dynamic: {len(config.lazy_layers)} lazy layers ({short_layers(config.lazy_layers)}), cut at "
            f"each request's {config.decide.replace('-', ' ')}; {config.sink_tokens} sink + "
            f"{config.recent_tokens} recent tokens; from {config.source}"
        )
    if config.dynamic:
        keep = DEFAULT_KEEP if config.keep is None else config.keep
        return (
            f"dynamic: each request keeps {keep} layers full, found by {config.score} at its "
            f"{config.decide.replace('-', ' ')}; {config.sink_tokens} sink + {config.recent_tokens} recent "
            f"tokens; from {config.source}"
        )
    return (
        f"{len(config.lazy_layers)} lazy layers ({short_layers(config.lazy_layers)}), "
        f"{config.sink_tokens} sink + {config.recent_tokens} recent tokens; from {config.source}"
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


def _typed(flag: str, name: str, text: str) -> str | int | float | bool:
    """The value that ``text`` writes for the option ``name``, checked; raises LightTransferError."""
    if name == "lazy_layers":
        parse_lazy_layers(text, flag)
        return text
    if name == "config":
        if not Path(text).is_file():
            # Now, since a model's name may be looked up for seconds before it is read.
            raise LightTransferError(f"{flag} {text}: cannot be read (no such file)")
        return text
    if name == "check_tables":
        if text not in ("on", "off"):
            raise LightTransferError(f"{flag}: {text!r} is not one of on, off")
        return text == "on"
    value: str | int | float = text
    if name == "keep":
        value = read_amount(text)
    elif name.endswith(("_tokens", "_bytes", "_queries")) and (number := read_int(text)) is not None:
        value = number
    check_value(name, value, flag)
    return value
