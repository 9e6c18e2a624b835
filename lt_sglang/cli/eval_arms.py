"""``lt-sglang eval --shares``: full attention, and lazy layers at each share, as ``--engine`` has them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lt_sglang.config import CONFIG_KEY, DYNAMIC_FIELDS, format_layers
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.options import LtOptions, flag_of, take_options
from lt_sglang.static_choices import CHOICES

FULL = "full"
# What a share decides.
DECIDED = ("mode", "keep", "lazy_layers", "config")
WINDOWS = ("sink_tokens", "recent_tokens")
PATTERNS = [name for name, pattern in CHOICES.items() if pattern.counts]


def arms(shares: Sequence[float], static: str | None, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """The engines, as NAME=OPTIONS, and the flags that all of them get.

    Args:
        shares: of the layers that are lazy.
        static: a file of ``lt-sglang calibrate``, whose windows all get, or a pattern such as ``ends``; None
            for no static lists.
        flags: SGLang's and ``--lt-*``; the latter go to all engines but full attention, where they apply.

    Raises:
        LightTransferError: a flag that a share decides, or no list for a share.
    """
    options, rest = take_options(list(flags))
    for name in DECIDED:
        if getattr(options, name) is not None:
            raise LightTransferError(
                f"{flag_of(name)}: --shares decides it; name such an engine with --engine"
            )
    order: list[int] = []
    if static is not None and static not in PATTERNS:
        order, windows = _calibrated(Path(static).expanduser())
        # Static and dynamic mode are compared at the same windows.
        options = replace(options, **{name: getattr(options, name) or windows.get(name) for name in WINDOWS})
    listed = replace(options, mode="static", **dict.fromkeys(DYNAMIC_FIELDS))
    engines = [FULL]
    for share in shares:
        if static is not None:
            layers = _first(order, share) if order else f"{static}:{share:g}"
            engines.append(_engine("static", share, replace(listed, lazy_layers=layers)))
        dynamic = replace(options, mode="dynamic", keep=round(1 - share, 6))
        engines.append(_engine("dynamic", share, dynamic))
    return engines, rest


def _engine(name: str, share: float, options: LtOptions) -> str:
    return f"{name}-{100 * share:g}={shlex.join(options.as_flags())}"


def _first(order: Sequence[int], share: float) -> str:
    """A share of the layers, rounded as ``--lt-keep`` is."""
    lazy = len(order) - round((1 - share) * len(order))
    if not 1 <= lazy < len(order):
        raise LightTransferError(
            f"--shares {share:g}: of {len(order)} layers that is {lazy}; 1 to {len(order) - 1}"
        )
    return format_layers(sorted(order[:lazy]))


def _calibrated(path: Path) -> tuple[list[int], Mapping[str, Any]]:
    """The layers of a calibrated file, those first that are made lazy first, and its configuration."""
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))[CONFIG_KEY]
        found = config["_calibration"]
        if "order" in found:
            order = [int(layer) for layer in found["order"]]
            return order + [layer for layer in range(len(order) + 1) if layer not in order], config
        counts, means = found["lazy_in_samples"], found["mean_laziness"]
        ranks = sorted(zip(counts, means, range(len(counts)), strict=True), reverse=True)
        return [layer for _, _, layer in ranks], config
    except (OSError, ValueError) as error:
        raise LightTransferError(
            f"--static {path}: is neither a file that can be read ({error}) nor one of {', '.join(PATTERNS)}"
        ) from None
    except (KeyError, TypeError):
        raise LightTransferError(
            f"--static {path}: has no counts of lt-sglang calibrate, so there is no list for each share; "
            "name the list by --engine 'static=--lt-config FILE'"
        ) from None
