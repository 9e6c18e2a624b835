"""``lt-sglang eval --shares``: full attention, and lazy layers at each share, as ``--engine`` has them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lt_sglang.config import CONFIG_KEY, DYNAMIC_FIELDS, format_layers
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.options import flag_of, take_options
from lt_sglang.static_choices import CHOICES

FULL = "full"
# What a share decides.
DECIDED = ("mode", "keep", "lazy_layers", "config")


def arms(shares: Sequence[float], static: str | None, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """The engines, as NAME=OPTIONS, and the flags that all of them get.

    Args:
        shares: of the layers that are lazy.
        static: a file of ``lt-sglang calibrate``, or a pattern such as ``ends``; None for no static lists.
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
    listed = replace(options, **dict.fromkeys(DYNAMIC_FIELDS))
    engines = [FULL]
    for share in shares:
        if static is not None:
            config, layers = _list(static, share)
            flags = replace(listed, config=config, lazy_layers=layers).as_flags()
            engines.append(f"static-{_percent(share)}={shlex.join(flags)}")
        flags = replace(options, mode="dynamic", keep=round(1 - share, 6)).as_flags()
        engines.append(f"dynamic-{_percent(share)}={shlex.join(flags)}")
    return engines, rest


def _percent(share: float) -> str:
    return f"{100 * share:g}"


def _list(static: str, share: float) -> tuple[str | None, str]:
    """The file that windows are from, and lazy layers as ``--lt-lazy-layers`` has them."""
    if static in CHOICES and CHOICES[static].counts:
        return None, f"{static}:{share:g}"
    order = _order(Path(static).expanduser())
    lazy = len(order) - round((1 - share) * len(order))
    if not 1 <= lazy < len(order):
        raise LightTransferError(
            f"--shares {share:g}: of {len(order)} layers that is {lazy}; 1 to {len(order) - 1}"
        )
    return static, format_layers(sorted(order[:lazy]))


def _order(path: Path) -> list[int]:
    """The layers of a calibrated file, those first that are made lazy first."""
    patterns = ", ".join(name for name, pattern in CHOICES.items() if pattern.counts)
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))[CONFIG_KEY]["_calibration"]
        if "order" in found:
            order = [int(layer) for layer in found["order"]]
            return order + [layer for layer in range(len(order) + 1) if layer not in order]
        counts, means = found["lazy_in_samples"], found["mean_laziness"]
        ranks = sorted(zip(counts, means, range(len(counts)), strict=True), reverse=True)
        return [layer for _, _, layer in ranks]
    except (OSError, ValueError) as error:
        raise LightTransferError(
            f"--static {path}: is neither a file that can be read ({error}) nor one of {patterns}"
        ) from None
    except (KeyError, TypeError):
        raise LightTransferError(
            f"--static {path}: has no counts of lt-sglang calibrate, so there is no list for each share; "
            "name the list by --engine 'static=--lt-config FILE'"
        ) from None
