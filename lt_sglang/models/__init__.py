"""Models whose lazy layers are known because their publishers trained them that way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath
from typing import Any

from lt_sglang.config import CONFIG_KEY, LightTransferConfig


@dataclass(frozen=True)
class KnownModel:
    """A published checkpoint with a fixed list; ``match`` are lower-case last path components."""

    name: str
    match: tuple[str, ...]
    num_layers: int
    architecture: str
    config: LightTransferConfig
    origin: str


def known_models() -> list[KnownModel]:
    """Every model of ``known.json``, validated."""
    text = resources.files(__name__).joinpath("known.json").read_text()
    models = []
    for entry in json.loads(text):
        config = LightTransferConfig.from_dict(entry["lighttransfer"], source=f"known model {entry['name']}")
        config.check_model(entry["num_layers"])
        models.append(
            KnownModel(
                name=entry["name"],
                match=tuple(entry["match"]),
                num_layers=entry["num_layers"],
                architecture=entry["architecture"],
                config=config,
                origin=entry["origin"],
            )
        )
    return models


def find_config(
    overrides: Mapping[str, Any],
    model_config: Mapping[str, Any] | None,
    model_path: str,
    overrides_source: str,
) -> LightTransferConfig | None:
    """That of the override arguments, else the model's own, else the known model's, else None.

    overrides_source: what the first is from, unless it says so itself. Raises LightTransferError.
    """
    if CONFIG_KEY in overrides:
        given = overrides[CONFIG_KEY]
        named = isinstance(given, Mapping) and "source" in given
        return LightTransferConfig.from_dict(given, source=None if named else overrides_source)
    if model_config is not None and CONFIG_KEY in model_config:
        return LightTransferConfig.from_dict(model_config[CONFIG_KEY], source="the model's config.json")
    known = find_known(model_path)
    return known.config if known is not None else None


def find_known(model_path: str) -> KnownModel | None:
    """The known model that ``model_path`` (a hub name or a folder) names, or None."""
    tail = PurePath(model_path.rstrip("/")).name.lower()
    return next((model for model in known_models() if tail in model.match), None)
